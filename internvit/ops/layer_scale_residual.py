"""The end of a block's branch: LayerScale and DropPath applied, added to the residual stream.

    residual_out = residual + row_scale[b] * gamma * branch

residual [B, ..., C] T or float32; branch, same shape, T; gamma [C], T or float32, or None (folded into the GEMM);
row_scale [B] float32 or None: DropPath's factor of each image, 0 or 1 / keep. residual_out has residual's dtype and is
rounded once.
"""

from typing import Any

import torch
from torch import Tensor

from internvit.numerics import norm_violations
from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, sum_rows
from internvit.ops.core.registration import define, define_backward
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Inputs, OpSpec, register_spec, widened

OP = "layer_scale_residual"


def factor(x: Tensor, gamma: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """x * gamma * row_scale[b], in x's dtype."""
    if gamma is not None:
        x = x * gamma.to(x.dtype)
    if row_scale is not None:
        x = x * row_scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x


@implements(OP, "reference")
def layer_scale_residual_reference(
    residual: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None
) -> Tensor:
    dtype = accumulate_dtype(residual, branch)
    return (residual.to(dtype) + factor(branch.to(dtype), gamma, row_scale)).to(residual.dtype).contiguous()


@implements(f"{OP}_backward", "reference")
def layer_scale_residual_backward_reference(  # type: ignore[no-untyped-def]
    grad_residual_out, branch, gamma, row_scale, branch_dtype, output_mask
):
    grad = grad_residual_out.to(accumulate_dtype(grad_residual_out, branch))
    grad_branch, grad_gamma = None, None
    if output_mask[0]:
        grad_branch = factor(grad, gamma, row_scale).to(branch_dtype, copy=True).contiguous()
    if output_mask[1]:
        assert branch is not None
        assert gamma is not None
        grad_gamma = sum_rows(factor(grad * branch.to(grad.dtype), None, row_scale)).to(gamma.dtype)
    return grad_branch, grad_gamma


def validate_residual(
    op: str, residual: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None
) -> None:
    check.rows(op, "residual", residual)
    check.same_shape(op, "branch", branch, "residual", residual)
    check.floating(op, residual=residual, branch=branch, gamma=gamma)
    check.device(op, "residual", residual, branch=branch, gamma=gamma, row_scale=row_scale)
    validate_residual_dtype(op, "residual", residual, "branch's dtype", branch.dtype)
    check.vector(op, "gamma", gamma, residual.shape[-1], "residual's last dimension")
    check.row_scale(op, row_scale, residual)


def validate_residual_dtype(op: str, name: str, t: Tensor, first: str, dtype: torch.dtype) -> None:
    if t.dtype not in (dtype, torch.float32):
        raise ValueError(f"{op}: {name} must have {first} {dtype} or be torch.float32, got {t.dtype}")


def validate_residual_backward(  # type: ignore[no-untyped-def]
    op: str, first: str, x: Tensor, branch, gamma, row_scale, source: str, branch_dtype, grad_gamma_asked: bool
) -> None:
    """The arguments that grad_branch and grad_gamma are made of; x is the residual stream or its gradient.

    `source` is where the branch's dtype comes from.
    """
    check.rows(op, first, x)
    check.floating(op, **{first: x})
    validate_residual_dtype(op, first, x, source, branch_dtype)
    check.device(op, first, x, branch=branch, row_scale=row_scale)
    if branch is not None:
        check.same_shape(op, "branch", branch, first, x)
        if branch.dtype != branch_dtype:
            raise ValueError(f"{op}: branch must have {source} {branch_dtype}, got {branch.dtype}")
    check.parameters(op, first, x, x.shape[-1], f"{first}'s last dimension", gamma=gamma)
    check.row_scale(op, row_scale, x)
    for name, t in (("branch", branch), ("gamma", gamma)):
        if grad_gamma_asked and t is None:
            raise ValueError(f"{op}: {name} must be given where output_mask asks for grad_gamma, got None")


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_residual_out, branch, gamma, row_scale, branch_dtype, output_mask, backend
) -> None:
    op = f"{OP}_backward"
    check.output_mask(op, output_mask, 2)
    if branch_dtype not in check.FLOATING:
        raise ValueError(f"{op}: branch_dtype must be float32, bfloat16, float16 or float64, got {branch_dtype}")
    validate_residual_backward(
        op,
        "grad_residual_out",
        grad_residual_out,
        branch,
        gamma,
        row_scale,
        "branch_dtype",
        branch_dtype,
        output_mask[1],
    )


LAYER_SCALE_RESIDUAL = define(
    f"{OP}(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale) -> Tensor residual_out",
    fake=lambda residual, *_: residual.new_empty(residual.shape),
    validate=lambda *args: validate_residual(OP, *args),
    choose=lambda args, asked: resolve(OP, args[1], asked),
    compiled=("cpu", "cuda"),
)
define_backward(
    LAYER_SCALE_RESIDUAL,
    f"{OP}_backward(Tensor grad_residual_out, Tensor? branch, Tensor? gamma, Tensor? row_scale,"
    " ScalarType branch_dtype, bool[2] output_mask) -> (Tensor grad_branch, Tensor grad_gamma)",
    validate=_validate_backward,
    grads_like={"grad_branch": lambda named: named["grad_residual_out"].to(named["branch_dtype"])},
    saved_for={"branch": ("gamma",)},
    passes_through="residual",
)


def layer_scale_residual(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Adds a LayerScaled, DropPathed branch to the residual stream.

    residual_out = residual + row_scale[b] * gamma * branch

    Args:
        residual: [B, ..., C], branch's dtype or float32.
        branch: [B, ..., C], float32, bfloat16, float16 or float64.
        gamma: [C], LayerScale; None where it is folded into the GEMM before.
        row_scale: [B] float32, DropPath's factor per image (0 or 1 / keep probability); gets no gradient.
        backend: overrides `internvit.backend`.

    Returns:
        residual_out: [B, ..., C], residual's dtype, contiguous, rounded once.

    Raises:
        ValueError: a wrong shape, dtype or device.

    Source: Touvron et al. 2021 (LayerScale), https://arxiv.org/abs/2103.17239; Huang et al. 2016 (stochastic depth).
    """
    return LAYER_SCALE_RESIDUAL.call((residual, branch, gamma, row_scale), backend)


def formula(residual: Tensor, branch: Tensor, gamma: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
    """residual + row_scale[b] * gamma * branch in plain PyTorch."""
    return residual + factor(branch, gamma, row_scale)


def residual_violations(arguments: dict[str, Any], out: Tensor) -> list[str]:
    """What residual_out breaks of the contract: the sum of two terms that may cancel."""
    named: dict[str, Any] = {n: arguments.get(n) for n in ("residual", "branch", "gamma", "row_scale")}
    wide = widened(named)
    term = factor(wide["branch"], wide["gamma"], wide["row_scale"])
    return norm_violations(out, wide["residual"] + term, formula(**named), wide["residual"].abs() + term.abs())


def _example(make: Inputs) -> dict[str, Any]:
    return {
        "residual": make.hidden_states(),
        "branch": make.branch(),
        "gamma": make.vector(0.5),
        "row_scale": make.drop_path(),
    }


register_spec(
    OpSpec(
        layer_scale_residual,
        OP,
        formula,
        {"": _example, "gamma=None": lambda make: {**_example(make), "gamma": None}},
        lambda arguments, actual, truth, eager: residual_violations(arguments, actual[0]),
    )
)
