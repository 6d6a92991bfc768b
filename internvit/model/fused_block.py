"""The block on the fused ops: what the model, `internvit.patch` and `internvit.optimize_for_inference` run.

    x = x + row_scale * gamma1 * proj(attention(norm1(x)))
    x = x + row_scale * gamma2 * fc2(gelu(fc1(norm2(x))))

`BlockParts` says where each of them finds its norms, Linears, LayerScale and DropPath. Between two branches there is
one pass over memory: `layer_scale_residual_norm` adds a branch and normalises the sum for the next one. Parts are read
from the modules at each call, so that a replaced parameter is seen.
"""

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from internvit.model import recompute
from internvit.model.attention_summary import AttentionSummary, Folded
from internvit.model.hooks import has_global_hooks, is_plain_linear
from internvit.ops import (
    attention,
    gelu,
    layer_norm,
    layer_norm_quant,
    layer_scale_residual,
    layer_scale_residual_norm,
    layer_scale_residual_norm_quant,
    linear_gelu,
    linear_layer_scale,
    qk_norm_attention,
    qk_norm_attention_qkvpacked,
    rms_norm,
    rms_norm_quant,
)
from internvit.ops.core.norm_math import statistics
from internvit.ops.core.sequences import Sequences
from internvit.ops.linear import linear, trained_linear
from internvit.ops.linear_gelu import linear_gelu_with_pre_activation
from internvit.ops.linear_layer_scale import adds_residual

Function: TypeAlias = Callable[[Any], Tensor]


class QuantizedRows(NamedTuple):
    """A normed tensor [B, N, C] in int8, with a scale and a zero point for each token: x_scale * (x_q - x_zero)."""

    x_q: Tensor
    x_scale: Tensor
    x_zero: Tensor


class FoldedRows(NamedTuple):
    """The stream [B, N, C] that a norm is of, and its statistics [B, N], for Linears that hold the norm's weights.

    Attributes:
        mean: None for RMSNorm.
    """

    x: Tensor
    mean: Tensor | None
    rstd: Tensor


Normed: TypeAlias = Tensor | QuantizedRows | FoldedRows


class Norm(NamedTuple):
    """A block norm that the fused ops may compute: the parameters of its module.

    Attributes:
        quantized: whether it writes `QuantizedRows`, for int8 Linears; with rounding "fused", without gradients.
        folded: whether it is in the weights of the Linears behind it, which take `FoldedRows`; alike.
        linear_dtype: of the weights behind it; None where it is the norm's own.
    """

    norm_type: str
    weight: Tensor
    bias: Tensor | None
    eps: float
    rounding: str = "fused"
    quantized: bool = False
    folded: bool = False
    linear_dtype: torch.dtype | None = None

    def compute(self, x: Tensor) -> Any:
        """norm(x), in the dtype that the Linears behind it take."""
        if self.folded:
            mean, rstd = statistics(x, self.norm_type, self.eps)
            return FoldedRows(x, mean if self.norm_type == "layer_norm" else None, rstd)
        if self.quantized and self.norm_type == "rms_norm":
            return QuantizedRows(*rms_norm_quant(x, self.weight, eps=self.eps, symmetric=False))
        if self.quantized:
            return QuantizedRows(*layer_norm_quant(x, self.weight, self.bias, eps=self.eps, symmetric=False))
        dtype = self.linear_dtype or self.weight.dtype
        if self.norm_type == "rms_norm":
            return cast_for_linear(rms_norm(x, self.weight, eps=self.eps, rounding=self.rounding), dtype)
        return cast_for_linear(layer_norm(x, self.weight, self.bias, eps=self.eps), dtype)

    def __call__(self, x: Tensor) -> Any:
        """norm(x), recomputed in backward."""
        y = self.compute(x)
        return y if self.quantized or self.folded else self.rematerialize(x, y)

    def rematerialize(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns y = norm(x); backward recomputes it from x instead of keeping it."""
        if not recompute.active():
            return y
        x_only, dtype = x.detach(), y.dtype
        return recompute.rematerialize(y, lambda: self.compute(x_only).to(dtype), x, self.weight, self.bias)


class AttentionParts(NamedTuple):
    """Attention up to its last Linear.

    Attributes:
        qkv: the packed projection [B, N, C] -> [B, N, 3 C], or those of q, k and v.
        q_norm, k_norm: QK-norm over all heads together; modules that are no plain norm are called; None without.
        scale: of the scores; None for 1 / sqrt(head_dim).
        rounding: of the fused QK-norm.
        sequences: of packed images; x is then [total, C].
        summary: is given what the block reports of its attention.
    """

    qkv: tuple[Function, ...]
    num_heads: int
    q_norm: Norm | Function | None = None
    k_norm: Norm | Function | None = None
    scale: float | None = None
    rounding: str = "fused"
    sequences: Sequences | None = None
    summary: AttentionSummary | None = None


class BranchOutput(NamedTuple):
    """The end of a branch: its last Linear, LayerScale and DropPath.

    Attributes:
        linear: [B, N, K] -> [B, N, C].
        gamma: [C], LayerScale; None where the Linear's weight holds it, or there is none.
        row_scale: DropPath's factor per image [B] for a branch [B, N, C], or None.
        linear_residual: (hidden, residual) -> residual + gamma * linear(hidden), by a GEMM that adds the residual in
            its epilogue; None where there is no such GEMM.
        linear_residual_folded: (hidden, residual, norm) -> that sum with the statistics of a folded norm, by one GEMM.
    """

    linear: Function
    gamma: Tensor | None
    row_scale: Callable[[Tensor], Tensor | None] | None = None
    linear_residual: Callable[[Tensor, Tensor], Tensor] | None = None
    linear_residual_folded: Callable[[Tensor, Tensor, Norm], FoldedRows] | None = None


class BranchScale:
    """What a branch is multiplied by before it is added; no pytree, so that no wrapper casts it."""

    def __init__(self, gamma: Tensor | None, row_scale: Tensor | None) -> None:
        # A copy: a wrapper frees the parameter once its block has run.
        self.gamma = None if gamma is None else gamma.clone()
        self.row_scale = row_scale


class PendingBranch(NamedTuple):
    """A branch [B, N, C] that the next block adds to the residual stream, in the pass of its first norm."""

    branch: Tensor
    scale: BranchScale


class Defer(Enum):
    """In place of a norm: the branch is not added but returned, as a `PendingBranch`."""

    BRANCH = "branch"


class BlockParts(NamedTuple):
    """Where a block finds what it computes with.

    Attributes:
        norm1, norm2: a `Norm` is fused with the pass before it; anything else is called.
        attention: `attention_output` with its parts, or a module for the whole branch, with an `identity` as its end.
        fc1_gelu: gelu(fc1(x)), or a module for the whole branch, with an `identity` as its end.
        proj, fc2: the ends of the branches.
    """

    norm1: Norm | Function
    attention: Function
    proj: BranchOutput
    norm2: Norm | Function
    fc1_gelu: Function
    fc2: BranchOutput


def run_block(
    parts: BlockParts, x: Tensor, normed: Normed | None, next_norm: Norm | Defer | None
) -> tuple[Tensor, Any]:
    """One block between two neighbours.

    Args:
        parts: of this block.
        x: [B, N, C], the residual stream.
        normed: norm1(x), where the block before has computed it.
        next_norm: the norm that the next block begins with, computed in this block's last pass; or `Defer`.

    Returns:
        The residual stream after this block, and next_norm of it (None without next_norm). With `Defer` the stream
        before the last branch and that branch, or None where a GEMM has added it.
    """
    if normed is None:
        normed = parts.norm1(x)
    return run_after_attention(parts, x, parts.attention(normed), next_norm)


def run_after_attention(
    parts: BlockParts, x: Tensor, attended: Tensor, next_norm: Norm | Defer | None
) -> tuple[Tensor, Any]:
    """What of `run_block` follows attention's output `attended` [B, N, C]."""
    x, normed = add_branch(x, attended, parts.proj, parts.norm2)
    del attended  # or it stays alive during the MLP
    return add_branch(x, parts.fc1_gelu(normed), parts.fc2, next_norm)


def add_branch(
    x: Tensor, hidden: Tensor, end: BranchOutput, norm: Norm | Function | Defer | None
) -> tuple[Tensor, Any]:
    """The residual stream x [B, N, C] with the branch that ends in end.linear(hidden), and `norm` of the sum.

    With `Defer`: x, and the branch.
    """
    if end.linear_residual_folded is not None and isinstance(norm, Norm) and norm.folded:
        rows = end.linear_residual_folded(hidden, x, norm)
        return rows.x, rows
    # A float32 stream stays with the fused pass: its norm alone would write float32, and a cast would read that again.
    if end.linear_residual is not None and x.dtype == hidden.dtype:
        x = end.linear_residual(hidden, x)
        return x, None if norm is None or isinstance(norm, Defer) else norm(x)
    branch = end.linear(hidden)
    del hidden
    row_scale = None if end.row_scale is None else end.row_scale(branch)
    if isinstance(norm, Defer):
        branch = torch.ops.aten._unsafe_view(branch, branch.shape)  # no view, of whose edits FSDP2 would warn
        return x, PendingBranch(branch, BranchScale(end.gamma, row_scale))
    return _add_scaled(x, branch, end.gamma, row_scale, norm)


def add_pending(x: Tensor, pending: PendingBranch, norm: Norm | Function) -> tuple[Tensor, Tensor]:
    """The residual stream x [B, N, C] with the branch of the block before, and `norm` of the sum."""
    return _add_scaled(x, pending.branch, pending.scale.gamma, pending.scale.row_scale, norm)


def _add_scaled(
    x: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None, norm: Any
) -> tuple[Tensor, Any]:
    if not isinstance(norm, Norm) or norm.folded:
        out = layer_scale_residual(x, branch, gamma, row_scale)
        return out, None if norm is None else norm(out)
    args = (x, branch, norm.weight, norm.bias, gamma, row_scale)
    if norm.quantized:
        out, *rows = layer_scale_residual_norm_quant(*args, eps=norm.eps, norm_type=norm.norm_type, symmetric=False)
        return out, QuantizedRows(*rows)
    out, normed = layer_scale_residual_norm(*args, eps=norm.eps, norm_type=norm.norm_type, rounding=norm.rounding)
    return out, norm.rematerialize(out, normed)


def attention_output(parts: AttentionParts, x: Tensor) -> Tensor:
    """Attention's output for normed tokens x [B, N, C], or [total, C] of packed images, before its last Linear."""
    qkv = [project(x) for project in parts.qkv]
    if len(qkv) == 1:
        heads = [qkv[0].unflatten(-1, (3, parts.num_heads, -1))]  # [B, N, 3, H, D] or [total, 3, H, D]
    else:
        heads = [t.unflatten(-1, (parts.num_heads, -1)) for t in qkv]  # 3 of [B, N, H, D] or [total, H, D]
    q_norm, k_norm = parts.q_norm, parts.k_norm
    if parts.summary is not None:
        return _summarized_attention(parts, parts.summary, heads).flatten(-2)
    packed: dict[str, Any] = {} if parts.sequences is None else parts.sequences.settings()
    fused: Any = qk_norm_attention_qkvpacked if len(heads) == 1 else qk_norm_attention
    if q_norm is None and k_norm is None:
        return fused(*heads, scale=parts.scale, **packed).flatten(-2)
    inside = norms_inside(parts)
    if inside is not None:
        weights, settings = (inside[0].weight, inside[1].weight), {"scale": parts.scale, "rounding": parts.rounding}
        return fused(*heads, *weights, eps=inside[0].eps, **settings, **packed).flatten(-2)
    q, k, v = heads if len(heads) == 3 else heads[0].unbind(-3)
    return attention(*norm_heads(q_norm, k_norm, q, k, v), scale=parts.scale, **packed).flatten(-2)


def norms_inside(parts: AttentionParts) -> tuple[Norm, Norm] | None:
    """QK-norm's two norms where attention can take them inside, with one eps; None where they are called."""
    q_norm, k_norm = parts.q_norm, parts.k_norm
    if isinstance(q_norm, Norm) and isinstance(k_norm, Norm) and q_norm.eps == k_norm.eps:
        return q_norm, k_norm
    return None


def _summarized_attention(parts: AttentionParts, summary: AttentionSummary, heads: list[Tensor]) -> Tensor:
    q, k, v = heads if len(heads) == 3 else heads[0].unbind(-3)
    inside, norm = norms_inside(parts), None
    if inside is not None:
        norm = Folded(inside[0].weight, inside[1].weight, inside[0].eps, parts.rounding)
    else:
        q, k, v = norm_heads(parts.q_norm, parts.k_norm, q, k, v)
    return summary.attend(q, k, v, norm, parts.scale, parts.sequences)


def norm_heads(q_norm: Any, k_norm: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, N, H, D] with QK-norm over all heads together, in v's dtype."""
    q_normed = q if q_norm is None else q_norm(q.flatten(-2)).view(q.shape).to(v.dtype)
    k_normed = k if k_norm is None else k_norm(k.flatten(-2)).view(k.shape).to(v.dtype)
    return q_normed, k_normed, v


def cast_for_linear(y: Tensor, dtype: torch.dtype) -> Tensor:
    """A normed float32 stream in the dtype of the Linears behind the norm, where that has 16 bits."""
    return y.to(dtype) if y.dtype == torch.float32 and dtype.itemsize == 2 else y


def call_module(module: nn.Module, x: Tensor, *others: Any) -> Tensor:
    """module(x, ...); a pre-hook may edit x, so that backward must not compute it again."""
    return module(recompute.keep(x) if module._forward_pre_hooks or has_global_hooks() else x, *others)


def linear_per_image(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) of a Linear; without gradients, the same bits for an image alone and in any batch."""
    if torch.jit.is_tracing() or not is_plain_linear(module):
        return call_module(module, x)
    return linear_invariant(x, module.weight, module.bias)


def linear_invariant(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_per_image` of a weight instead of a module."""
    return trained_linear(x, weight, bias) if torch.is_grad_enabled() else linear(x, weight, bias)


def linear_or_folded(
    module: nn.Module,
    gamma: Tensor,
    fold: bool,
    row_scale: Callable[[Tensor], Tensor | None] | None,
) -> BranchOutput:
    """The end of a branch in the Linear `module`; with `fold`, LayerScale is in its weight wherever it is trained."""
    if fold and torch.is_grad_enabled() and is_plain_linear(module):
        return BranchOutput(partial(_folded_linear, module, gamma), None, row_scale)
    linear_residual = None
    # torch.jit.trace checks a graph with gradients against one without.
    asked = row_scale is None and not torch.is_grad_enabled() and not torch.jit.is_tracing()
    if asked and is_plain_linear(module) and adds_residual(module.weight):
        linear_residual = partial(_folded_linear, module, gamma)
    return BranchOutput(partial(linear_per_image, module), gamma, row_scale, linear_residual)


def _folded_linear(module: nn.Linear, gamma: Tensor, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return linear_layer_scale(x, module.weight, gamma, module.bias, residual)


def fc1_gelu(fc1: nn.Module, x: Tensor) -> Tensor:
    """gelu(fc1(x)), in one op where fc1 is a plain Linear; backward recomputes it from the pre-activation."""
    if not is_plain_linear(fc1):
        return gelu(call_module(fc1, x))
    if not recompute.active():
        return linear_gelu(x, fc1.weight, fc1.bias)
    hidden, pre, backend = linear_gelu_with_pre_activation(x, fc1.weight, fc1.bias)
    return recompute.rematerialize(hidden, lambda: gelu(pre, backend=backend), pre)


def gelu_recomputed(pre: Tensor) -> Tensor:
    """gelu of a Linear's output; backward recomputes it."""
    kept = pre.detach()
    return recompute.rematerialize(gelu(pre), lambda: gelu(kept), pre)


def identity(x: Tensor) -> Tensor:
    """The last Linear of a branch whose module has run as a whole."""
    return x
