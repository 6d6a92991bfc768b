"""A block whose norms are in the GEMMs around them: qkv and fc1 take the stream, proj and fc2 its next statistics.

    norm1, qkv   qkv = rstd1 * (x W'^T - mean1 * sum W') + b',  W' and b' by `fold_norm`; with QK-norm its statistics
    proj         x = x + gamma1 * proj(attention),  and mean2, rstd2 of it
    norm2, fc1   hidden = gelu(rstd2 * (x W'^T - mean2 * sum W') + b')
    fc2          x = x + gamma2 * fc2(hidden),  and mean and rstd of the next block's norm1

Weights are folded at each call, from the modules as they are then: nothing is kept that could become stale, and CUDA
graphs read them where they lie. That writes a copy of qkv's and fc1's weights, which a large batch repays and a small
one does not (docs/lower-bounds.md). Without gradients, and on backend `triton_gemm` alone. No GPU has run this yet.
"""

from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from internvit.model.block import InternViTLayer, is_unmodified
from internvit.model.fused_block import (
    AttentionParts,
    BlockParts,
    BranchOutput,
    FoldedRows,
    Norm,
    attention_output,
    norms_inside,
)
from internvit.model.layers import fusible
from internvit.ops import attention, fold_norm, linear_residual_stats, norm_linear, norm_qkv
from internvit.ops.core.select import resolve
from internvit.ops.core.sequences import Sequences

BACKEND = "triton_gemm"


def can_fold(layer: nn.Module) -> TypeGuard[InternViTLayer]:
    """Whether nothing in the layer was modified, its norms round once, and the backend in force has such GEMMs.

    Not in float16: a norm's weight is small where the stream's channel is large, and their products with the Linear's
    weights leave its normal range, which begins at 6e-5.
    """
    if not is_unmodified(layer) or layer.shares_heads or layer.training or layer.attn.qkv.weight.dtype == torch.float16:
        return False
    norms = [fusible(m) for m in (layer.norm1, layer.norm2)]
    if any(not isinstance(norm, Norm) or norm.rounding != "fused" for norm in norms):
        return False
    return resolve("norm_linear", layer.attn.qkv.weight) == BACKEND


def folded_parts(layer: InternViTLayer, sequences: Sequences | None = None) -> BlockParts:
    """The parts of a layer that `can_fold`."""
    parts = layer.parts(sequences)
    norm1, norm2 = (norm._replace(folded=True) for norm in (parts.norm1, parts.norm2) if isinstance(norm, Norm))
    return parts._replace(
        norm1=norm1,
        attention=partial(_attention, layer.attn.parts(sequences), layer.attn.qkv, norm1),
        proj=_with_statistics(parts.proj, layer.attn.proj, layer.ls1),
        norm2=norm2,
        fc1_gelu=partial(_fc1_gelu, layer.mlp.fc1, norm2),
        fc2=_with_statistics(parts.fc2, layer.mlp.fc2, layer.ls2),
    )


def _operands(linear: nn.Linear, norm: Norm, rows: FoldedRows) -> Any:
    """The first arguments of `norm_linear`."""
    centred = norm.norm_type == "layer_norm"
    weight, bias, weight_sum = fold_norm(linear.weight, linear.bias, norm.weight, norm.bias, centred=centred)
    return rows.x, weight, bias, rows.rstd, rows.mean, weight_sum if centred else None


def _fc1_gelu(fc1: nn.Linear, norm: Norm, rows: FoldedRows) -> Tensor:
    y: Tensor = norm_linear(*_operands(fc1, norm, rows), gelu=True)
    return y


def _attention(parts: AttentionParts, qkv: nn.Linear, norm: Norm, rows: FoldedRows) -> Tensor:
    """`attention_output` of folded rows."""
    operands = _operands(qkv, norm, rows)
    inside = norms_inside(parts)
    if inside is None or parts.rounding != "fused":
        projected = norm_linear(*operands)
        return attention_output(parts._replace(qkv=(lambda _: projected,)), rows.x)
    projected, rstd_q, rstd_k = norm_qkv(*operands, eps=inside[0].eps)
    q, k, v = projected.unflatten(-1, (3, parts.num_heads, -1)).unbind(-3)
    packed: dict[str, Any] = {} if parts.sequences is None else parts.sequences.settings()
    weights = inside[0].weight, inside[1].weight
    return attention(q, k, v, *weights, rstd_q, rstd_k, scale=parts.scale, **packed).flatten(-2)


def _with_statistics(end: BranchOutput, linear: nn.Linear, gamma: Tensor) -> BranchOutput:
    def add(hidden: Tensor, residual: Tensor, norm: Norm) -> FoldedRows:
        arguments = hidden, linear.weight, linear.bias, gamma, residual
        x, mean, rstd = linear_residual_stats(*arguments, eps=norm.eps, norm_type=norm.norm_type)
        return FoldedRows(x, mean if norm.norm_type == "layer_norm" else None, rstd)

    return end._replace(linear_residual_folded=add)
