"""Checkpoints whose Linears have int8 weights with a scale for each row, as compressed-tensors writes them.

`NAME.weight` is int8 [M, K] and `NAME.weight_scale` [M, 1]; config.json says in `quantization_config` that the format
is "int-quantized", and names the Linears without it under "ignore". They are read as floating point:

    weight = weight_scale * integers, rounded once

Source: vllm-project/compressed-tensors 0.20.0, config/base.py and compressors/quantized_compressors/naive_quantized.py.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvit.files import read_json
from internvit.names import listed, match

SUFFIX = "_scale"
FORMAT = "int-quantized"


def quantization_config(ignore: Iterable[str]) -> dict[str, Any]:
    """The entry of config.json for int8 weights and inputs that are quantised at each call, a token at a time."""
    integers = {"num_bits": 8, "type": "int", "group_size": None, "block_structure": None, "actorder": None}
    weights = {**integers, "symmetric": True, "dynamic": False, "strategy": "channel", "observer": "minmax"}
    inputs = {**integers, "symmetric": False, "dynamic": True, "strategy": "token", "observer": None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": {**group, "format": FORMAT}},
        "ignore": sorted(ignore),
    }


def is_scale(key: str) -> bool:
    """Whether a key is the scale of an InternViT's weight."""
    return key.endswith(f".weight{SUFFIX}") and match(key.removesuffix(SUFFIX)) is not None


def read_scales(path: Path, config: Path, unexpected: Iterable[str], sources: Collection[str]) -> dict[str, str]:
    """The scale's key for each int8 weight, of keys that a plain checkpoint does not have.

    Args:
        path: of the checkpoint, for messages.
        config: the config.json beside the weights.
        unexpected: those keys.
        sources: the keys of the parameters.

    Raises:
        ValueError: config.json does not say how to read them, or in a way other than this module's.
    """
    scales = {key.removesuffix(SUFFIX): key for key in unexpected if is_scale(key)}
    scales = {weight: scale for weight, scale in scales.items() if weight in sources}
    if scales:
        _check_config(path, config, sorted(scales.values()))
    return scales


def _check_config(path: Path, config: Path, scales: list[str]) -> None:
    fields = read_json(config) if config.exists() else {}
    while isinstance(fields, dict) and "quantization_config" not in fields and fields.get("vision_config"):
        fields = fields["vision_config"]
    entry = fields.get("quantization_config") if isinstance(fields, dict) else None
    expected = f"{path}: expected a quantization_config in {config.name} that explains the scales {listed(scales)}"
    if not isinstance(entry, Mapping):
        raise ValueError(f"{expected}, got none")
    if entry.get("format") != FORMAT:
        raise ValueError(f"{expected}, with format {FORMAT!r}, got {entry.get('format')!r}")
    groups = entry.get("config_groups")
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        weights = weights if isinstance(weights, Mapping) else {}
        got = {key: weights.get(key) for key in ("num_bits", "type", "symmetric", "strategy")}
        if got != {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}:
            raise ValueError(f"{expected}: symmetric int8 weights with a scale for each channel, got {got} in {name}")


def check_scale(path: Path, key: str, scale: Tensor, rows: int) -> Tensor:
    """The scale [M, 1] of `rows` rows, in float32.

    Raises:
        ValueError: of another shape or dtype, or with values that no quantiser gives.
    """
    if not scale.is_floating_point() or scale.numel() != rows or scale.shape[0] != rows:
        raise ValueError(
            f"{path}: expected {key} to be floating point of shape [{rows}, 1], got {scale.dtype} of shape "
            f"{list(scale.shape)}"
        )
    scale = scale.to(torch.float32).view(rows, 1)
    if not (scale.isfinite() & (scale >= 0)).all():
        raise ValueError(f"{path}: expected {key} to hold finite numbers from 0 on, got {scale.min()} to {scale.max()}")
    return scale
