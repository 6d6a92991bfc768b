"""Parameter groups for training: layer-wise learning-rate decay, as OpenGVLab fine-tunes InternViT.

    lr of a group = lr * layer_decay ** (num_layers + 1 - id)
    id = 0: patch, class and position embedding;  n + 1: block n;  num_layers + 1: everything else (necks, heads)

The ViT is found by its patch embedding's name, so that a head's own `layers.0` is not taken for a block.
"""

import math
import re
from typing import Any

from torch import nn

# Patch embedding, all below the blocks, the blocks: OpenGVLab and internvit; mmseg and timm; transformers.
_SPELLINGS = (
    (r"embeddings\.patch_embedding\.", r"embeddings\.", r"encoder\.layers\.(\d+)\."),
    (r"patch_embed\.proj\.", r"(?:patch_embed\.|(?:cls_token|pos_embed|mask_token|visual_embed)$)", r"blocks\.(\d+)\."),
    (r"embeddings\.patch_embeddings\.projection\.", r"embeddings\.", r"encoder\.layer\.(\d+)\."),
)
_TOKENS = re.compile(r"(?:class_embedding|cls_token|position_embeddings?|pos_embed)$")


class _Depth:
    """The layer id of each parameter of a model with one ViT inside."""

    def __init__(self, names: list[str]) -> None:
        found = {
            (match.group(1), embeddings, blocks)
            for patch, embeddings, blocks in _SPELLINGS
            for match in (re.match(rf"(|.*\.){patch}", name) for name in names)
            if match
        }
        if len(found) != 1:
            got = ", ".join(sorted(prefix or "its root" for prefix, _, _ in found)) or "none"
            raise ValueError(f"param_groups_layer_decay: model must hold exactly one InternViT, got {got}")
        prefix, embeddings, blocks = found.pop()
        self._embeddings = re.compile(re.escape(prefix) + embeddings)
        self._blocks = re.compile(re.escape(prefix) + blocks)
        self.num_layers = 1 + max((int(m.group(1)) for m in map(self._blocks.match, names) if m), default=-1)

    def __call__(self, name: str) -> int:
        if self._embeddings.match(name):
            return 0
        block = self._blocks.match(name)
        return int(block.group(1)) + 1 if block else self.num_layers + 1


def _validate(model: nn.Module, weight_decay: float, layer_decay: float, lr: float | None) -> None:
    for name, value, holds, expected in (
        ("model", type(model).__name__, isinstance(model, nn.Module), "a torch.nn.Module"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "a number >= 0"),
        ("layer_decay", layer_decay, 0 < layer_decay <= 1, "in (0, 1]"),
        ("lr", lr, lr is None or 0 <= lr < math.inf, "a number >= 0 or None"),
    ):
        if not holds:
            raise ValueError(f"param_groups_layer_decay: {name} must be {expected}, got {value!r}")


def param_groups_layer_decay(
    model: nn.Module,
    weight_decay: float = 0.05,
    layer_decay: float = 0.95,
    lr: float | None = None,
    upstream_weight_decay_quirk: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups whose learning rate falls from the head to the embeddings.

    lr of a group = lr * layer_decay ** (num_layers + 1 - id), with the ids of this module's docstring. Parameters of
    one dimension or named bias, the class token and the position embedding get no weight decay.

    Args:
        model: an InternViT, its backbone, or a model with one of them inside, under OpenGVLab's, mmseg's, timm's or
            transformers' names; patched, wrapped or with adapters. Frozen parameters are left out.
        weight_decay: of all other parameters.
        layer_decay: in (0, 1]; upstream trains with 0.95.
        lr: the head's learning rate; None leaves `lr` out, for optimizers that read `lr_scale`, as timm's do.
        upstream_weight_decay_quirk: also decays the class token and the position embedding. Upstream means to exempt
            them and compares names that never match.

    Returns:
        Groups for any torch optimizer, from the embeddings up: `params`, `param_names`, `name`, `lr_scale`,
        `weight_decay` and, where asked for, `lr`.

    Raises:
        ValueError: a value out of its range, or not exactly one InternViT in the model.

    Source: CustomLayerDecayOptimizerConstructor in OpenGVLab's
        segmentation/mmcv_custom/layer_decay_optimizer_constructor.py; Bao et al. 2021, https://arxiv.org/abs/2106.08254.

    Example:
        >>> groups = internvit.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.95, lr=4e-5)
        >>> optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    """
    _validate(model, weight_decay, layer_decay, lr)
    depth = _Depth([name for name, _ in model.named_parameters()])
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = depth(name)
        is_token = layer == 0 and _TOKENS.search(name) is not None
        decays = parameter.dim() > 1 and not name.endswith(".bias") and (upstream_weight_decay_quirk or not is_token)
        scale = layer_decay ** (depth.num_layers + 1 - layer)
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "param_names": [],
                "name": f"layer_{layer}_{'decay' if decays else 'no_decay'}",
                "lr_scale": scale,
                "weight_decay": float(weight_decay) if decays else 0.0,
                **({} if lr is None else {"lr": lr * scale}),
            },
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups)]
