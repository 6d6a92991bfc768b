"""RMSNorm and LayerNorm of rows: one kernel forward and one backward; LayerNorm is RMSNorm of the centred row.

    x_hat = (x - mean) * rstd,  rstd = 1 / sqrt(mean((x - mean)^2) + eps),  y = x_hat * weight + bias
    grad_x = rstd * (g - x_hat * mean(g * x_hat) - mean(g)),  g = grad_y * weight

RMSNorm takes mean = 0 and drops mean(g). The device functions here are also the norm of
`layer_scale_residual_norm` and `qk_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch
from internvit.kernels.common.rows import (
    as_rows,
    load_tile,
    load_vector,
    persistent_programs,
    row_launch,
    row_tile,
    store_partial,
    store_tile,
    sum_partials,
)
from internvit.ops.core.registration import Mask, empty_grad


@triton.jit
def standardize(b_x, m_tile, eps, C: tl.constexpr, CENTRED: tl.constexpr):
    """x_hat [ROWS, BLOCK_C], mean [ROWS] and rstd [ROWS] of rows held whole.

    Squares are divided by C before they are summed, so that |x| up to 1e18 stays finite in float32. What rounding left
    in the mean is subtracted a second time: with values around 30 the few that lie next to the mean were off by up to
    14 ulp in bfloat16 without it.
    """
    b_mean = tl.sum(b_x, 1) / C
    if CENTRED:
        b_x = tl.where(m_tile, b_x - b_mean[:, None], 0.0)
        b_rest = tl.sum(b_x, 1) / C
        b_x = tl.where(m_tile, b_x - b_rest[:, None], 0.0)
        b_mean += b_rest
    b_rstd = tl.rsqrt(tl.sum(b_x * (b_x * (1.0 / C)), 1) + eps)
    return b_x * b_rstd[:, None], b_mean, b_rstd


@triton.jit
def scale_and_shift(b_x_hat, b_weight, p_bias, o_cols, dtype, C: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """x_hat * weight + bias; ROUND_FIRST rounds x_hat to `dtype` before, and the product after, as upstream does."""
    if ROUND_FIRST:
        return (b_x_hat.to(dtype).to(tl.float32) * b_weight[None, :]).to(dtype).to(tl.float32)
    b_y = b_x_hat * b_weight[None, :]
    if p_bias is not None:
        b_y += load_vector(p_bias, o_cols, C)[None, :]
    return b_y


@triton.jit
def norm_backward(b_grad_y, b_x_hat, b_weight, b_rstd, C: tl.constexpr, CENTRED: tl.constexpr):
    """grad_x [ROWS, BLOCK_C]; masked columns of grad_y and x_hat hold 0."""
    b_g = b_grad_y * b_weight[None, :]
    b_inner = b_g - b_x_hat * (tl.sum(b_g * b_x_hat, 1) / C)[:, None]
    if CENTRED:
        b_inner -= (tl.sum(b_g, 1) / C)[:, None]
    return b_inner * b_rstd[:, None]


@triton.jit
def load_x_hat(p_x, p_mean, p_rstd, o_rows, m_rows, stride, o_cols, m_tile, CENTRED: tl.constexpr):
    """x_hat [ROWS, BLOCK_C] from saved statistics, and rstd [ROWS]."""
    b_x = load_tile(p_x, o_rows, stride, o_cols, m_tile)
    b_rstd = tl.load(p_rstd + o_rows, mask=m_rows, other=0.0)
    if CENTRED:
        b_mean = tl.load(p_mean + o_rows, mask=m_rows, other=0.0)
        b_x = tl.where(m_tile, b_x - b_mean[:, None], 0.0)
    return b_x * b_rstd[:, None], b_rstd


@triton.jit
def norm_kernel(
    p_x,  # [M, C]
    p_weight,  # [C]
    p_bias,  # [C] or None
    p_y,  # [M, C]
    p_mean,  # [M], LayerNorm
    p_rstd,  # [M]
    M,
    stride_x,
    eps,
    C: tl.constexpr,
    CENTRED: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_rows, o_cols, m_rows, m_tile = row_tile(tl.program_id(0), M, C, ROWS, BLOCK_C)
    b_weight = load_vector(p_weight, o_cols, C)
    b_x = load_tile(p_x, o_rows, stride_x, o_cols, m_tile)
    b_x_hat, b_mean, b_rstd = standardize(b_x, m_tile, eps, C, CENTRED)
    b_y = scale_and_shift(b_x_hat, b_weight, p_bias, o_cols, p_x.dtype.element_ty, C, ROUND_FIRST)
    store_tile(p_y, o_rows, C, o_cols, m_tile, b_y)
    tl.store(p_rstd + o_rows, b_rstd, mask=m_rows)
    if CENTRED:
        tl.store(p_mean + o_rows, b_mean, mask=m_rows)


@triton.jit
def norm_backward_kernel(
    p_grad_y,  # [M, C]
    p_x,  # [M, C]
    p_weight,  # [C]
    p_mean,  # [M], LayerNorm
    p_rstd,  # [M]
    p_grad_x,  # [M, C] or None
    p_partials,  # [sums, programs, C] float32: weight's, then bias's
    M,
    stride_grad_y,
    stride_x,
    C: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHT_SUM: tl.constexpr,
    BIAS_SUM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_cols = tl.arange(0, BLOCK_C)
    b_weight = load_vector(p_weight, o_cols, C)
    b_weight_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    b_bias_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        o_rows, o_cols, m_rows, m_tile = row_tile(i_tile, M, C, ROWS, BLOCK_C)
        b_grad_y = load_tile(p_grad_y, o_rows, stride_grad_y, o_cols, m_tile)
        b_x_hat, b_rstd = load_x_hat(p_x, p_mean, p_rstd, o_rows, m_rows, stride_x, o_cols, m_tile, CENTRED)
        if p_grad_x is not None:
            b_grad_x = norm_backward(b_grad_y, b_x_hat, b_weight, b_rstd, C, CENTRED)
            store_tile(p_grad_x, o_rows, C, o_cols, m_tile, b_grad_x)
        if WEIGHT_SUM:
            b_weight_sum += b_grad_y * b_x_hat
        if BIAS_SUM:
            b_bias_sum += b_grad_y
    if WEIGHT_SUM:
        store_partial(p_partials, 0, b_weight_sum, o_cols, C)
    if BIAS_SUM:
        store_partial(p_partials, 1 if WEIGHT_SUM else 0, b_bias_sum, o_cols, C)


def norm(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, centred: bool, rounding: str
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean (empty for RMSNorm), rstd."""
    rows = as_rows(x)
    M, C = rows.shape
    choice = row_launch(op, C, launch.target_of(x))
    y = x.new_empty(x.shape)
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    mean = torch.empty_like(rstd) if centred else empty_grad(x)
    launch.run(
        norm_kernel,
        (triton.cdiv(M, choice.rows),),
        *(rows, weight.contiguous(), None if bias is None else bias.contiguous(), y, mean, rstd),
        *(M, rows.stride(0), eps),
        C=C,
        CENTRED=centred,
        ROUND_FIRST=rounding == "reference",
        ROWS=choice.rows,
        BLOCK_C=triton.next_power_of_2(C),
        num_warps=choice.warps,
    )
    return y, mean, rstd


def norm_gradients(
    op: str, grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, centred: bool, output_mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x, grad_weight, grad_bias; `output_mask` says which are wanted."""
    grad_rows, rows = as_rows(grad_y), as_rows(x)
    M, C = rows.shape
    target = launch.target_of(x)
    choice = row_launch(f"{op}_backward", C, target)
    programs = persistent_programs(M, choice, target)
    sums = output_mask[1] + output_mask[2]
    grad_x = x.new_empty(x.shape) if output_mask[0] else None
    partials = x.new_empty((sums, programs, C), dtype=torch.float32)
    launch.run(
        norm_backward_kernel,
        (programs if any(output_mask) else 0,),
        *(grad_rows, rows, weight.contiguous(), mean, rstd.contiguous(), grad_x, partials),
        *(M, grad_rows.stride(0), rows.stride(0)),
        C=C,
        CENTRED=centred,
        WEIGHT_SUM=output_mask[1],
        BIAS_SUM=output_mask[2],
        ROWS=choice.rows,
        BLOCK_C=triton.next_power_of_2(C),
        num_warps=choice.warps,
    )
    summed = iter(sum_partials(partials, *[weight] * sums))
    return (
        empty_grad(x) if grad_x is None else grad_x,
        next(summed) if output_mask[1] else empty_grad(x),
        next(summed) if output_mask[2] else empty_grad(x),
    )
