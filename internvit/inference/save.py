"""Writing a model whose Linears run in int8 as a checkpoint that holds them in int8."""

import os
from collections.abc import Collection
from pathlib import Path

import torch

from internvit.checkpoint.quantized import SUFFIX, quantization_config
from internvit.checkpoint.save import contents, write_checkpoint
from internvit.checkpoint.state_dict import conversion_plan
from internvit.inference.int8_grid import quantize_weight
from internvit.inference.packed_block import LINEARS
from internvit.model.vit import InternViT


@torch.no_grad()
def save_quantized(
    model: InternViT,
    int8: Collection[str],
    folder: str | os.PathLike[str],
    layout: str,
    max_shard_size: int | str,
    overwrite: bool,
) -> Path:
    """Writes config.json and the weights, those of the Linears `int8` as int8 values with a scale for each row.

    Raises:
        ValueError: a weight that is not finite; otherwise as `internvit.checkpoint.save.save_pretrained`.
    """
    tensors, fields = contents(model, layout)
    state = model.state_dict()
    ignored = []
    for name, pieces in conversion_plan(state, layout).targets.items():
        linear = pieces[0].key.removesuffix(".weight")
        if linear in int8:
            weight_q, scale = quantize_weight(state[pieces[0].key].cpu())
            if not scale.isfinite().all():
                raise ValueError(f"model: expected finite weights, got others in {pieces[0].key}")
            tensors[name] = pieces[0].of(weight_q)
            tensors[name + SUFFIX] = pieces[0].of(scale.unsqueeze(1))
        elif linear.endswith(LINEARS) and name.endswith(".weight"):
            ignored.append(name.removesuffix(".weight"))
    if int8:
        fields["quantization_config"] = quantization_config(ignored)
    return write_checkpoint(tensors, fields, folder, max_shard_size, overwrite)
