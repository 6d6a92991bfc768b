"""The seam between two branches in one pass: residual + LayerScale + DropPath, and the next norm of it.

    residual_out = residual + row_scale[b] * gamma * branch
    normed       = norm(residual_out) * weight (+ bias)

Reads two [B, ..., C] tensors and writes two. The statistics are those of residual_out as rounded to its dtype, so that
this op and `layer_scale_residual` followed by the norm give the same bits.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, norm_backward, scale_and_shift, standardize, statistics
from internvit.ops.core.registration import Mask, below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import reference, resolve
from internvit.ops.layer_scale_residual import (
    check_arguments,
    layer_scale_residual_backward_reference,
    layer_scale_residual_reference,
)

OP = "layer_scale_residual_norm"


@reference(OP)
def layer_scale_residual_norm_reference(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_out = layer_scale_residual_reference(residual, branch, gamma, row_scale)
    mean, rstd = statistics(residual_out, kind, eps)
    x_hat = standardize(residual_out, mean, rstd, kind)
    rounding = rounding if kind == "rms_norm" else "fused"
    normed = scale_and_shift(x_hat, weight, bias, residual_out.dtype, rounding).to(branch.dtype)
    return residual_out, normed, mean, rstd


@reference(f"{OP}_backward")
def layer_scale_residual_norm_backward_reference(
    grad_residual_out: Tensor | None,
    grad_normed: Tensor,
    residual_out: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
    output_mask: Mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad, grad_weight, grad_bias = norm_backward(grad_normed, residual_out, weight, mean, rstd, kind)
    if grad_residual_out is not None:
        grad = grad + grad_residual_out
    grad_branch, grad_gamma = layer_scale_residual_backward_reference(
        grad, branch, gamma, row_scale, grad_normed.dtype, output_mask[1:3]
    )
    return (
        grad.to(residual_out.dtype).contiguous() if output_mask[0] else empty_grad(grad),
        grad_branch,
        grad_gamma,
        grad_weight.to(weight.dtype) if output_mask[3] else empty_grad(grad),
        grad_bias.to(weight.dtype) if output_mask[4] else empty_grad(grad),
    )


class LayerScaleResidualNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        gamma: Tensor | None,
        row_scale: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        kind: str,
        rounding: str,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        outputs = below_autograd(
            LAYER_SCALE_RESIDUAL_NORM,
            *(residual, branch, gamma, row_scale, weight, bias, eps, kind, rounding, backend),
        )
        residual_out, _, mean, rstd = outputs
        saved_branch = branch if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(residual_out, saved_branch, gamma, row_scale, weight, mean, rstd)
        ctx.kind, ctx.backend, ctx.branch_dtype = kind, backend, branch.dtype
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, grad_residual_out: Tensor | None, grad_normed: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        if grad_residual_out is None and grad_normed is None:
            return (None,) * 10
        saved = ctx.saved_tensors  # read once: a checkpoint gives each saved tensor out only once
        residual_out = saved[0]
        if grad_normed is None:
            grad_normed = residual_out.new_zeros(residual_out.shape, dtype=ctx.branch_dtype)
        needs = ctx.needs_input_grad
        mask = (needs[0], needs[1], needs[2], needs[4], needs[5])
        grads = wanted(
            LAYER_SCALE_RESIDUAL_NORM_BACKWARD(grad_residual_out, grad_normed, *saved, ctx.kind, mask, ctx.backend),
            mask,
        )
        return (*grads[:3], None, *grads[3:], None, None, None, None)


def _fake_forward(residual, branch, gamma, row_scale, weight, bias, eps, kind, rounding, backend):  # type: ignore[no-untyped-def]
    dtype = accumulate_dtype(residual)
    rows = residual.shape[:-1]
    return (
        residual.new_empty(residual.shape),
        branch.new_empty(branch.shape),
        residual.new_empty(rows if kind == "layer_norm" else (0,), dtype=dtype),
        residual.new_empty(rows, dtype=dtype),
    )


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_residual_out,
    grad_normed,
    residual_out,
    branch,
    gamma,
    row_scale,
    weight,
    mean,
    rstd,
    kind,
    output_mask,
    backend,
):
    shapes = (
        (residual_out, residual_out.dtype),
        (residual_out, grad_normed.dtype),
        (gamma, None if gamma is None else gamma.dtype),
        (weight, weight.dtype),
        (weight, weight.dtype),
    )
    return tuple(
        like.new_empty(like.shape, dtype=dtype) if asked else empty_grad(rstd)
        for (like, dtype), asked in zip(shapes, output_mask, strict=True)
    )


LAYER_SCALE_RESIDUAL_NORM = define(
    f"{OP}(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale, Tensor weight, Tensor? bias, float eps,"
    " str kind, str rounding, str backend) -> (Tensor residual_out, Tensor normed, Tensor mean, Tensor rstd)",
    fake=_fake_forward,
    autograd=LayerScaleResidualNormFunction,
)
LAYER_SCALE_RESIDUAL_NORM_BACKWARD = define(
    f"{OP}_backward(Tensor? grad_residual_out, Tensor grad_normed, Tensor residual_out, Tensor? branch, Tensor? gamma,"
    " Tensor? row_scale, Tensor weight, Tensor mean, Tensor rstd, str kind, bool[5] output_mask, str backend)"
    " -> (Tensor grad_residual, Tensor grad_branch, Tensor grad_gamma, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_backward,
)


def layer_scale_residual_norm(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    kind: str = "rms_norm",
    rounding: str = "fused",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum, in one pass.

    residual_out = residual + row_scale[b] * gamma * branch
    normed = rms_norm(residual_out, weight)  or  layer_norm(residual_out, weight, bias)

    Args:
        residual: [B, ..., C], branch's dtype or float32.
        branch: [B, ..., C], float32, bfloat16, float16 or float64.
        gamma: [C], LayerScale; None where it is folded into the GEMM before.
        row_scale: [B] float32, DropPath's factor per image; gets no gradient.
        weight: [C], of the norm, branch's dtype or float32.
        bias: [C], weight's dtype; LayerNorm only.
        eps: of the norm.
        kind: "rms_norm" or "layer_norm".
        rounding: "fused" or "reference", as in `rms_norm`.
        backend: overrides `internvit.backend`.

    Returns:
        residual_out: [B, ..., C], residual's dtype; normed: [B, ..., C], branch's dtype. The same bits as
        `layer_scale_residual` followed by the norm.

    Raises:
        ValueError: a wrong shape, dtype, device or choice.

    Source: the block of OpenGVLab's modeling_intern_vit.py, lines 291-293.
    """
    check_arguments(OP, residual, branch, gamma, row_scale)
    check.floating(OP, weight=weight, bias=bias)
    check.device(OP, "residual", residual, weight=weight, bias=bias)
    check.vector(OP, "weight", weight, residual.shape[-1], "residual's last dimension")
    check.vector(OP, "bias", bias, residual.shape[-1], "residual's last dimension")
    check.eps(OP, eps)
    check.choice(OP, "kind", kind, check.KINDS)
    check.choice(OP, "rounding", rounding, check.ROUNDINGS)
    if bias is not None:
        if kind == "rms_norm":
            raise ValueError(f"{OP}: bias must be None for kind='rms_norm', got a tensor of shape {list(bias.shape)}")
        check.same_dtype(OP, "weight", weight, bias=bias)
    name = resolve(OP, residual, backend)
    outputs = LAYER_SCALE_RESIDUAL_NORM(residual, branch, gamma, row_scale, weight, bias, eps, kind, rounding, name)
    return outputs[0], outputs[1]
