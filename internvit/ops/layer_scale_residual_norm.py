"""The end of one branch and the norm of the next in one pass: residual + LayerScale + DropPath, then RMS- or LayerNorm.

    residual_out = residual + row_scale[b] * gamma * branch
    normed       = norm(residual_out) * weight (+ bias)

Reads two [B, ..., C] tensors and writes two. The statistics are those of residual_out as rounded to its dtype, so that
this op and `layer_scale_residual` followed by the norm give the same bits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.numerics import layer_norm_terms, norm_violations
from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, norm_backward, scale_and_shift, standardize, statistics
from internvit.ops.core.registration import define, define_backward
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Inputs, OpSpec, register_spec
from internvit.ops.layer_scale_residual import formula as residual_formula
from internvit.ops.layer_scale_residual import (
    layer_scale_residual_backward_reference,
    layer_scale_residual_reference,
    residual_violations,
    validate_residual,
    validate_residual_backward,
)

OP = "layer_scale_residual_norm"


@implements(OP, "reference")
def layer_scale_residual_norm_reference(  # type: ignore[no-untyped-def]
    residual, branch, gamma, row_scale, weight, bias, eps, norm_type, rounding
):
    residual_out = layer_scale_residual_reference(residual, branch, gamma, row_scale)
    mean, rstd = statistics(residual_out, norm_type, eps)
    x_hat = standardize(residual_out, mean, rstd, norm_type)
    rounding = rounding if norm_type == "rms_norm" else "fused"
    normed = scale_and_shift(x_hat, weight, bias, residual_out.dtype, rounding).to(branch.dtype)
    return residual_out, normed, mean, rstd


@implements(f"{OP}_backward", "reference")
def layer_scale_residual_norm_backward_reference(  # type: ignore[no-untyped-def]
    grad_residual_out, grad_normed, residual_out, branch, gamma, row_scale, weight, mean, rstd, norm_type, output_mask
):
    grad, grad_weight, grad_bias = norm_backward(grad_normed, residual_out, weight, mean, rstd, norm_type)
    if grad_residual_out is not None:
        grad = grad + grad_residual_out
    grad_branch, grad_gamma = layer_scale_residual_backward_reference(
        grad, branch, gamma, row_scale, grad_normed.dtype, output_mask[1:3]
    )
    return (
        grad.to(residual_out.dtype).contiguous() if output_mask[0] else None,
        grad_branch,
        grad_gamma,
        grad_weight.to(weight.dtype) if output_mask[3] else None,
        grad_bias.to(weight.dtype) if output_mask[4] else None,
    )


def validate_fused_norm(  # type: ignore[no-untyped-def]
    op: str, residual, branch, gamma, row_scale, weight, bias, eps, norm_type
) -> None:
    """For the ops whose arguments begin as this one's."""
    validate_residual(op, residual, branch, gamma, row_scale)
    check.floating(op, weight=weight, bias=bias)
    check.device(op, "residual", residual, weight=weight, bias=bias)
    check.vector(op, "weight", weight, residual.shape[-1], "residual's last dimension")
    check.vector(op, "bias", bias, residual.shape[-1], "residual's last dimension")
    check.eps(op, eps)
    check.choice(op, "norm_type", norm_type, check.NORM_TYPES)
    if bias is not None:
        if norm_type == "rms_norm":
            raise ValueError(f"{op}: bias must be None for norm_type='rms_norm', got shape {check.shape_of(bias)}")
        check.bias(op, bias, weight)


def _validate(*args: Any) -> None:
    *norm, rounding = args
    validate_fused_norm(OP, *norm)
    check.choice(OP, "rounding", rounding, check.ROUNDINGS)


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_residual_out,
    grad_normed,
    residual_out,
    branch,
    gamma,
    row_scale,
    weight,
    mean,
    rstd,
    norm_type,
    output_mask,
    backend,
) -> None:
    op, first = f"{OP}_backward", "residual_out"
    check.output_mask(op, output_mask, 5)
    check.choice(op, "norm_type", norm_type, check.NORM_TYPES)
    check.rows(op, first, residual_out)
    check.floating(op, grad_normed=grad_normed)
    check.device(op, first, residual_out, grad_normed=grad_normed)
    check.same_shape(op, "grad_normed", grad_normed, first, residual_out)
    check.like(op, first, residual_out, grad_residual_out=grad_residual_out)
    validate_residual_backward(
        op, first, residual_out, branch, gamma, row_scale, "grad_normed's dtype", grad_normed.dtype, output_mask[2]
    )
    check.parameters(op, first, residual_out, residual_out.shape[-1], f"{first}'s last dimension", weight=weight)
    statistics = {"mean": mean, "rstd": rstd} if norm_type == "layer_norm" else {"rstd": rstd}
    check.leading(op, first, residual_out, residual_out.dim() - 1, "rows", **statistics)


def _fake(  # type: ignore[no-untyped-def]
    residual, branch, gamma, row_scale, weight, bias, eps, norm_type, rounding, backend
):
    rows, dtype = residual.shape[:-1], accumulate_dtype(residual)
    return (
        residual.new_empty(residual.shape),
        branch.new_empty(branch.shape),
        residual.new_empty(rows if norm_type == "layer_norm" else (0,), dtype=dtype),
        residual.new_empty(rows, dtype=dtype),
    )


LAYER_SCALE_RESIDUAL_NORM = define(
    f"{OP}(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale, Tensor weight, Tensor? bias, float eps,"
    " str norm_type, str rounding) -> (Tensor residual_out, Tensor normed, Tensor mean, Tensor rstd)",
    fake=_fake,
    validate=_validate,
    choose=lambda args, asked: resolve(OP, args[1], asked),
    compiled=("cpu", "cuda"),
)
define_backward(
    LAYER_SCALE_RESIDUAL_NORM,
    f"{OP}_backward(Tensor? grad_residual_out, Tensor grad_normed, Tensor residual_out, Tensor? branch, Tensor? gamma,"
    " Tensor? row_scale, Tensor weight, Tensor mean, Tensor rstd, str norm_type, bool[5] output_mask)"
    " -> (Tensor grad_residual, Tensor grad_branch, Tensor grad_gamma, Tensor grad_weight, Tensor grad_bias)",
    validate=_validate_backward,
    grads_like={"grad_residual": "residual_out", "grad_branch": "grad_normed", "grad_bias": "weight"},
    saved_for={"branch": ("gamma",)},
)


def layer_scale_residual_norm(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm_type: str = "rms_norm",
    rounding: str = "fused",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum, in one pass.

    residual_out = residual + row_scale[b] * gamma * branch
    normed = rms_norm(residual_out, weight)  or  layer_norm(residual_out, weight, bias)

    Args:
        residual: [B, ..., C], branch's dtype or float32.
        branch: [B, ..., C], float32, bfloat16, float16 or float64.
        weight: [C], of the norm, branch's dtype or float32.
        bias: [C], weight's dtype; LayerNorm only.
        gamma: [C], LayerScale; None where it is folded into the GEMM before.
        row_scale: [B] float32, DropPath's factor per image; gets no gradient.
        eps: of the norm.
        norm_type: "rms_norm" or "layer_norm".
        rounding: "fused" or "reference", as in `rms_norm`.
        backend: overrides `internvit.backend`.

    Returns:
        residual_out: [B, ..., C], residual's dtype; normed: [B, ..., C], branch's dtype. The same bits as
        `layer_scale_residual` followed by the norm.

    Raises:
        ValueError: a wrong shape, dtype, device or choice.

    Source: the block of OpenGVLab's modeling_intern_vit.py.
    """
    args = (residual, branch, gamma, row_scale, weight, bias, eps, norm_type, rounding)
    outputs = LAYER_SCALE_RESIDUAL_NORM.call(args, backend)
    return outputs[0], outputs[1]


def _formula(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Any = None,
    gamma: Any = None,
    row_scale: Any = None,
    **norm: Any,
) -> tuple[Tensor, Tensor]:
    out = residual_formula(residual, branch, gamma, row_scale)
    return out, norm_formula(out, weight, bias, **norm)


def norm_formula(x: Tensor, weight: Tensor, bias: Tensor | None, norm_type: str, eps: float = 1e-6) -> Tensor:
    if norm_type == "rms_norm":
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _violations(arguments: dict[str, Any], actual: tuple[Tensor, ...], truth: Any, eager: Any) -> list[str]:
    """The norm is compared with that of residual_out as rounded to its dtype, which its statistics are taken of."""
    out, normed = actual
    weight, bias, norm_type = (arguments[n] for n in ("weight", "bias", "norm_type"))
    wide: list[Any] = [t if t is None else t.double() for t in (out, weight, bias)]
    terms = None
    if norm_type == "layer_norm":
        terms = layer_norm_terms(out, weight, torch.zeros_like(weight) if bias is None else bias)
    plain = norm_formula(out.to(weight.dtype), weight, bias, norm_type)
    exact = norm_formula(wide[0], wide[1], wide[2], norm_type)
    return residual_violations(arguments, out) + norm_violations(normed, exact, plain, terms)


def example(make: Inputs, norm_type: str) -> dict[str, Any]:
    return {
        "residual": make.hidden_states(),
        "branch": make.branch(),
        "weight": make.vector(1.0),
        "bias": make.vector() if norm_type == "layer_norm" else None,
        "gamma": make.vector(0.5),
        "row_scale": make.drop_path(),
        "norm_type": norm_type,
    }


register_spec(
    OpSpec(
        layer_scale_residual_norm,
        OP,
        _formula,
        {
            "rms_norm": lambda make: example(make, "rms_norm"),
            "layer_norm": lambda make: example(make, "layer_norm"),
        },
        _violations,
    )
)
