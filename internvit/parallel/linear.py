"""Linears split over ranks, as autograd functions of this rank's part of the weight.

column_linear: y_r = x W_r^T + b_r           backward: dx = sum over r of dy_r W_r
row_linear:    y = sum over r of x_r W_r^T + b      backward: dx_r = dy W_r

A rank's part of a 16-bit sum is float32 until all parts are added: the result is rounded once, as a whole Linear's.
"""

from typing import Any

import torch
from torch import Tensor

from internvit.model.fused_block import linear_invariant
from internvit.ops.core.autocast import autocast_dtype, cast
from internvit.parallel.group import RankGroup


def column_linear(x: Tensor, weight: Tensor, bias: Tensor | None, group: RankGroup) -> Tensor:
    """This rank's output channels [..., M_r] of x [..., K], the same on every rank; weight [M_r, K]."""
    x, weight, bias = _as_autocast(x, weight, bias)
    return _Column.apply(x, weight, bias, group)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor, group: RankGroup) -> Tensor:
    """All output channels [..., M], on every rank, of this rank's x [..., K_r]; weight [M, K_r], bias [M]."""
    x, weight, bias = _as_autocast(x, weight, bias)
    return _Row.apply(x, weight, bias, group)


def _as_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    dtype = autocast_dtype(tensors[0].device.type)  # type: ignore[union-attr]
    return tensors if dtype is None else tuple(cast(t, dtype) for t in tensors)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: RankGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group = group
        return linear_invariant(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        pending = None
        if needs_x:  # the sum over ranks runs beside the weight's gradient
            pending = ctx.group.begin_sum(_wide_product(grad.flatten(0, -2), weight), x.dtype)
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if needs_weight else None
        grad_bias = grad.flatten(0, -2).sum(0) if needs_bias else None
        return None if pending is None else pending.finish().view(x.shape), grad_weight, grad_bias, None


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, group: RankGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        partial = _wide_product(x, weight.T).flatten(0, -2)
        return group.begin_sum(partial, x.dtype).finish(bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ weight if needs_x else None
        grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2) if needs_weight else None
        return grad_x, grad_weight, grad.flatten(0, -2).sum(0) if needs_bias else None, None


def _wide_product(x: Tensor, matrix: Tensor) -> Tensor:
    """x [..., K] times matrix [K, M], in float32 for 16-bit tensors; one image has the same bits in any batch."""
    if x.dtype.itemsize > 2:
        return linear_invariant(x, matrix.T, None)
    if x.is_cuda:
        rows = torch.mm(x.flatten(0, -2), matrix, out_dtype=torch.float32)
        return rows.view(*x.shape[:-1], matrix.shape[1])
    # CPUs have no product of 16-bit tensors into float32; gloo on CPUs is for tests.
    return linear_invariant(x.float(), matrix.T.float(), None)
