"""The end of a block's branch: LayerScale and DropPath applied, added to the residual stream.

    residual_out = residual + row_scale[b] * gamma * branch

residual [B, ..., C] T or float32; branch, same shape, T; gamma [C], T or float32, or None (folded into the GEMM);
row_scale [B] float32 or None: DropPath's factor of each image, 0 or 1 / keep. residual_out has residual's dtype and is
rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, sum_rows
from internvit.ops.core.registration import Mask, below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import reference, resolve

OP = "layer_scale_residual"


def factor(x: Tensor, gamma: Tensor | None, row_scale: Tensor | None) -> Tensor:
    """x * gamma * row_scale[b], in x's dtype."""
    if gamma is not None:
        x = x * gamma.to(x.dtype)
    if row_scale is not None:
        x = x * row_scale.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return x


@reference(OP)
def layer_scale_residual_reference(
    residual: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None
) -> Tensor:
    dtype = accumulate_dtype(residual, branch)
    return (residual.to(dtype) + factor(branch.to(dtype), gamma, row_scale)).to(residual.dtype).contiguous()


@reference(f"{OP}_backward")
def layer_scale_residual_backward_reference(
    grad_residual_out: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    branch_dtype: torch.dtype,
    output_mask: Mask,
) -> tuple[Tensor, Tensor]:
    grad = grad_residual_out.to(accumulate_dtype(grad_residual_out, branch))
    grad_branch, grad_gamma = empty_grad(grad), empty_grad(grad)
    if output_mask[0]:
        grad_branch = factor(grad, gamma, row_scale).to(branch_dtype, copy=True).contiguous()
    if output_mask[1]:
        assert branch is not None
        assert gamma is not None
        grad_gamma = sum_rows(factor(grad * branch.to(grad.dtype), None, row_scale)).to(gamma.dtype)
    return grad_branch, grad_gamma


class LayerScaleResidualFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None, backend: str
    ) -> Tensor:
        out = below_autograd(LAYER_SCALE_RESIDUAL, residual, branch, gamma, row_scale, backend)
        ctx.save_for_backward(branch if ctx.needs_input_grad[2] else None, gamma, row_scale)
        ctx.branch_dtype = branch.dtype
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        branch, gamma, row_scale = ctx.saved_tensors
        mask = ctx.needs_input_grad[1:3]
        grads: tuple[Tensor | None, ...] = (None, None)
        if any(mask):
            args = (grad, branch, gamma, row_scale, ctx.branch_dtype, mask, ctx.backend)
            grads = wanted(LAYER_SCALE_RESIDUAL_BACKWARD(*args), mask)
        return (grad if ctx.needs_input_grad[0] else None, *grads, None, None)


LAYER_SCALE_RESIDUAL = define(
    f"{OP}(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale, str backend) -> Tensor residual_out",
    fake=lambda residual, branch, gamma, row_scale, backend: residual.new_empty(residual.shape),
    autograd=LayerScaleResidualFunction,
)
LAYER_SCALE_RESIDUAL_BACKWARD = define(
    f"{OP}_backward(Tensor grad_residual_out, Tensor? branch, Tensor? gamma, Tensor? row_scale,"
    " ScalarType branch_dtype, bool[2] output_mask, str backend) -> (Tensor grad_branch, Tensor grad_gamma)",
    fake=lambda grad, branch, gamma, row_scale, branch_dtype, output_mask, backend: (
        grad.new_empty(grad.shape, dtype=branch_dtype) if output_mask[0] else empty_grad(grad),
        gamma.new_empty(gamma.shape) if output_mask[1] else empty_grad(grad),
    ),
)


def check_arguments(op: str, residual: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None) -> None:
    check.rows(op, "residual", residual)
    check.same_shape(op, "branch", branch, "residual", residual)
    check.floating(op, residual=residual, branch=branch, gamma=gamma)
    check.device(op, "residual", residual, branch=branch, gamma=gamma, row_scale=row_scale)
    if residual.dtype not in (branch.dtype, torch.float32):
        raise ValueError(
            f"{op}: residual must have branch's dtype {branch.dtype} or be torch.float32, got {residual.dtype}"
        )
    check.vector(op, "gamma", gamma, residual.shape[-1], "residual's last dimension")
    check.row_scale(op, row_scale, residual)


def layer_scale_residual(
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
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
    check_arguments(OP, residual, branch, gamma, row_scale)
    return LAYER_SCALE_RESIDUAL(residual, branch, gamma, row_scale, resolve(OP, residual, backend))
