"""One block whose four Linears have packed copies of their weights, LayerScale folded into proj and fc2.

    proj' = gamma1 * proj,  fc2' = gamma2 * fc2        (weight and bias, in float64, rounded once)

Passes over one [N, C] tensor per block in bf16 with epilogues: 26. norm1 2, qkv 4, attention 4, proj with its residual
3, norm2 2, fc1 with GELU 5, fc2 with its residual 6. The two norms stay passes of their own because a row's statistics
need all columns, which the threads of the GEMM before share. Linears in int8 quantise
their input in the pass that packs it for the product.
"""

from collections.abc import Collection
from functools import partial
from typing import TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn

from internvit.inference.linear import (
    PackedLinear,
    PrepackedLinear,
    fold_layer_scale,
    packed_linear_class,
    row_checksums,
)
from internvit.inference.linear_int8 import Int8Linear
from internvit.model.block import InternViTLayer, is_unmodified
from internvit.model.fused_block import BlockParts, BranchOutput, attention_output
from internvit.model.layers import fusible

Packed: TypeAlias = PackedLinear | PrepackedLinear | Int8Linear


LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The Linears of a layer, by name."""


class PackedBlock:
    """The packed Linears of one layer; everything else is read from the layer at each call.

    Args:
        int8: those of `LINEARS` that are computed in int8.

    Raises:
        ValueError: the layer cannot be packed; see `can_pack`.
    """

    def __init__(self, layer: InternViTLayer, int8: Collection[str] = ()) -> None:
        make = packed_linear_class(layer.attn.qkv.weight)
        if make is None:
            raise ValueError(f"layer: no packed Linear for {layer.attn.qkv.weight.dtype}")
        self.checksums = row_checksums(_sources(layer))

        def pack(name: str, gamma: Tensor | None = None) -> Packed:
            linear = _linear(layer, name)
            weight, bias = linear.weight.detach(), _detached(linear.bias)
            if name in int8:
                return Int8Linear(weight, bias, _detached(gamma))
            return make(weight, bias) if gamma is None else make(*fold_layer_scale(weight, bias, gamma.detach()))

        self.qkv, self.proj = pack("attn.qkv"), pack("attn.proj", layer.ls1)
        self.fc1, self.fc2 = pack("mlp.fc1"), pack("mlp.fc2", layer.ls2)
        self.int8 = tuple(name for name in LINEARS if name in int8)
        self.one_image = any(linear.one_image for linear in (self.qkv, self.proj, self.fc1, self.fc2))

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


def _branch_output(linear: Packed) -> BranchOutput:
    if isinstance(linear, Int8Linear):
        return BranchOutput(linear, None)
    return BranchOutput(linear, None, None, lambda hidden, residual: linear(hidden, residual=residual))


def _linear(layer: InternViTLayer, name: str) -> nn.Linear:
    return cast(nn.Linear, layer.get_submodule(name))


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _sources(layer: InternViTLayer) -> list[Tensor | None]:
    """What packed copies are made of."""
    linears = [_linear(layer, name) for name in LINEARS]
    return [*(t for m in linears for t in (m.weight, m.bias)), layer.ls1, layer.ls2]


def can_pack(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether nothing but InternViT's own forward happens in `layer` now, and its Linears have a packed form here."""
    if not is_unmodified(layer) or layer.shares_heads or (layer.training and layer.drop_path_rate > 0):
        return False
    weights = [_linear(layer, name).weight for name in LINEARS]
    same = all(w.dtype == weights[0].dtype and w.device == weights[0].device for w in weights)
    return same and packed_linear_class(weights[0]) is not None
