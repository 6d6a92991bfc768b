"""One block whose four Linears have packed copies of their weights.

A float32 stream takes LayerScale in the pass that adds the branch. A stream in the weights' dtype is added in the
epilogue of the GEMM, with LayerScale folded into proj and fc2:

    proj' = gamma1 * proj,  fc2' = gamma2 * fc2        (weight and bias, in float64, rounded once)

That rounds weights a second time: the error of a trained ViT-S is 1.12 % then instead of 0.87 (tokens of `coffee`, 224
px, mean of ten drawn pictures 0.1 % apart). int8 has LayerScale in the scales of the weight, unrounded.

Passes over one [N, C] tensor per block in bf16 with epilogues: 26. norm1 2, qkv 4, attention 4, proj with its residual
3, norm2 2, fc1 with GELU 5, fc2 with its residual 6. The two norms stay passes of their own because a row's statistics
need all columns, which the threads of the GEMM before share.

In int8 a norm writes int8 rows for qkv and fc1, proj quantises attention's output in the pass that packs it for the
product, and the MLP's hidden rows stay in cache: 20 passes in bf16's units, whose Linears write what they wrote before.
"""

from collections.abc import Collection
from functools import partial
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor, nn

from internvit.inference import linear_int8
from internvit.inference.linear import (
    PackedLinear,
    PrepackedLinear,
    fold_layer_scale,
    packed_linear_class,
    row_checksums,
)
from internvit.inference.linear_int8 import Int8Linear, Int8MLP
from internvit.inference.torchao_int8 import int8_linear_values
from internvit.model.attention_summary import AttentionSummary
from internvit.model.block import InternViTLayer, is_unmodified
from internvit.model.fused_block import BlockParts, BranchOutput, Function, Norm, attention_output, identity
from internvit.model.hooks import is_plain_linear
from internvit.model.layers import norm_before
from internvit.ops.core.sequences import Sequences

Packed: TypeAlias = PackedLinear | PrepackedLinear | Int8Linear


LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
"""The Linears of a layer, by name."""


class PackedBlock:
    """The packed Linears of one layer; everything else is read from the layer at each call.

    Args:
        int8: those of `LINEARS` that are computed in int8.
        fold: whether LayerScale is folded into the weights of proj and fc2.

    Raises:
        ValueError: the layer cannot be packed; see `can_pack`.
    """

    def __init__(self, layer: InternViTLayer, int8: Collection[str] = (), fold: bool = True) -> None:
        makes = {name: _packed_class(layer, name, name in int8) for name in LINEARS}
        if None in makes.values():
            raise ValueError(f"layer: no packed Linear for {layer.attn.qkv.weight.dtype}")
        self.checksums = row_checksums(_sources(layer))

        def pack(name: str, gamma: Tensor | None = None) -> Packed:
            linear = _linear(layer, name)
            weight, bias, make = linear.weight.detach(), _detached(linear.bias), makes[name]
            if make is Int8Linear:
                return Int8Linear(weight, bias, _detached(gamma))
            assert make is not None
            if gamma is None or not fold:
                return make(weight, bias)
            return make(*fold_layer_scale(weight, bias, gamma.detach()))

        self.qkv, self.proj = pack("attn.qkv"), pack("attn.proj", layer.ls1)
        self.fc1, self.fc2 = pack("mlp.fc1"), pack("mlp.fc2", layer.ls2)
        self.requested, self.fold = tuple(name for name in LINEARS if name in int8), fold
        self.int8 = tuple(name for name in LINEARS if makes[name] is Int8Linear)
        self.one_image = any(linear.one_image for linear in (self.qkv, self.proj, self.fc1, self.fc2))

    def is_current(self, layer: InternViTLayer) -> bool:
        """Whether the copies are still those of the layer's weights, to the bit (`row_checksums`)."""
        return torch.equal(self.checksums, row_checksums(_sources(layer)))

    def parts(
        self, layer: InternViTLayer, sequences: Sequences | None = None, summary: AttentionSummary | None = None
    ) -> BlockParts:
        fc1_gelu: Any = partial(self.fc1, gelu=True)
        fc2 = self._branch_output(self.fc2, layer.ls2)
        if isinstance(self.fc1, Int8Linear) and isinstance(self.fc2, Int8Linear):
            fc1_gelu, fc2 = Int8MLP(self.fc1, self.fc2), BranchOutput(identity, None)
        return BlockParts(
            _quantized_for(self.qkv, norm_before(layer.attn.qkv, layer.norm1)),
            partial(attention_output, layer.attn.parts(sequences, summary)._replace(qkv=(self.qkv,))),
            self._branch_output(self.proj, layer.ls1),
            _quantized_for(self.fc1, norm_before(layer.mlp.fc1, layer.norm2)),
            fc1_gelu,
            fc2,
        )

    def _branch_output(self, linear: Packed, gamma: Tensor | None) -> BranchOutput:
        if isinstance(linear, Int8Linear):
            return BranchOutput(linear, None)
        if not self.fold:
            return BranchOutput(linear, gamma)
        return BranchOutput(linear, None, None, lambda hidden, residual: linear(hidden, residual=residual))


def _quantized_for(linear: Packed, norm: Norm | Function) -> Norm | Function:
    """The norm, writing int8 rows where `linear` takes them."""
    if isinstance(linear, Int8Linear) and isinstance(norm, Norm) and norm.rounding == "fused":
        return norm._replace(quantized=True)
    return norm


def _linear(layer: InternViTLayer, name: str) -> nn.Linear:
    return cast(nn.Linear, layer.get_submodule(name))


def _detached(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach()


def _packed_class(layer: InternViTLayer, name: str, int8: bool) -> Any:
    """What a Linear of the layer is packed as: in int8 where that is asked for, or torchao has made it so."""
    linear = _linear(layer, name)
    if int8_linear_values(linear) is not None:
        return Int8Linear if linear_int8.unavailable_reason() is None else None
    make = packed_linear_class(linear.weight) if is_plain_linear(linear) else None
    return Int8Linear if int8 and make is not None else make


def _sources(layer: InternViTLayer) -> list[Tensor | None]:
    """What packed copies are made of."""
    linears = [_linear(layer, name) for name in LINEARS]
    weights = [int8_linear_values(m) or (m.weight,) for m in linears]
    return [*(t for values in weights for t in values), *(m.bias for m in linears), layer.ls1, layer.ls2]


def can_pack(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether nothing but InternViT's own forward happens in `layer` now, and its Linears have a packed form here."""
    if not is_unmodified(layer, quantised=True) or layer.shares_heads or (layer.training and layer.drop_path_rate > 0):
        return False
    weights = [_linear(layer, name).weight for name in LINEARS]
    same = all(w.dtype == weights[0].dtype and w.device == weights[0].device for w in weights)
    return same and all(_packed_class(layer, name, False) is not None for name in LINEARS)
