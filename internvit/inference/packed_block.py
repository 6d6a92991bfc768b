"""One block whose four Linears have packed copies of their weights, LayerScale folded into proj and fc2.

    proj' = gamma1 * proj,  fc2' = gamma2 * fc2        (weight and bias, in float64, rounded once)

Passes over one [N, C] tensor per block in bf16 with epilogues: 26. norm1 2, qkv 4, attention 4, proj with its residual
3, norm2 2, fc1 with GELU 5, fc2 with its residual 6. The two norms stay passes of their own because a row's statistics
need all columns, which the threads of the GEMM before share.
"""

from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

from internvit.inference.linear import (
    PackedLinear,
    PrepackedLinear,
    fold_layer_scale,
    packed_linear_class,
    row_checksums,
)
from internvit.model.block import InternViTLayer, is_unmodified
from internvit.model.fused_block import BlockParts, BranchOutput, attention_output
from internvit.model.layers import fusible


class PackedBlock:
    """The packed Linears of one layer; everything else is read from the layer at each call.

    Raises:
        ValueError: the layer cannot be packed; see `can_pack`.
    """

    def __init__(self, layer: InternViTLayer) -> None:
        make = packed_linear_class(layer.attn.qkv.weight)
        if make is None:
            raise ValueError(f"layer: no packed Linear for {layer.attn.qkv.weight.dtype}")
        self.checksums = row_checksums(_sources(layer))
        self.qkv, self.fc1 = (make(m.weight.detach(), _detached(m.bias)) for m in (layer.attn.qkv, layer.mlp.fc1))
        self.proj, self.fc2 = (
            make(*fold_layer_scale(m.weight.detach(), _detached(m.bias), gamma.detach()))
            for m, gamma in ((layer.attn.proj, layer.ls1), (layer.mlp.fc2, layer.ls2))
        )
        self.one_image = make.one_image

    def is_current(self, layer: InternViTLayer) -> bool:
        """Whether the copies are still those of the layer's weights, to the bit (`row_checksums`)."""
        return torch.equal(self.checksums, row_checksums(_sources(layer)))

    def parts(self, layer: InternViTLayer) -> BlockParts:
        return BlockParts(
            fusible(layer.norm1),
            partial(attention_output, layer.attn.parts()._replace(qkv=(self.qkv,))),
            _branch_output(self.proj),
            fusible(layer.norm2),
            partial(self.fc1, gelu=True),
            _branch_output(self.fc2),
        )


def _branch_output(linear: PackedLinear | PrepackedLinear) -> BranchOutput:
    return BranchOutput(linear, None, None, lambda hidden, residual: linear(hidden, residual=residual))


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _sources(layer: InternViTLayer) -> list[Tensor | None]:
    """What packed copies are made of."""
    linears = (layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2)
    return [*(t for m in linears for t in (m.weight, m.bias)), layer.ls1, layer.ls2]


def can_pack(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether nothing but InternViT's own forward happens in `layer` now, and its Linears have a packed form here."""
    if not is_unmodified(layer) or (layer.training and layer.drop_path_rate > 0):
        return False
    weights = [m.weight for m in (layer.attn.qkv, layer.attn.proj, layer.mlp.fc1, layer.mlp.fc2)]
    same = all(w.dtype == weights[0].dtype and w.device == weights[0].device for w in weights)
    return same and packed_linear_class(weights[0]) is not None
