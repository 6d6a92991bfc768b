"""The fused residual add and norm between two branches on a GPU, in one pass.

    residual_out = residual + row_scale[b] * gamma * branch
    normed       = norm(residual_out) * weight (+ bias)              reads 2, writes 2, and one or two float32 a row

    grad_residual = norm's grad_x(grad_normed) + grad_residual_out    reads 4, writes 2 (reads 3 without grad_gamma)
    grad_branch   = row_scale[b] * gamma * grad_residual,  and the sums over rows for gamma, weight and bias

All [M, C]. The statistics are those of residual_out as rounded to its dtype. With QUANT, normed is written as int8 or
float8 with a scale a row (`quantize_rows`), from float32, and no statistics are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch, rows
from internvit.kernels.common.rows import columns, load_tile, load_vector, row_tile, store_partial, store_tile
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.strides import in_elements, row_strides
from internvit.kernels.layer_scale_residual import add_branch, load_gamma, load_row_scale, rows_per_image
from internvit.kernels.norm import is_small, load_x_hat, norm_backward, scale_and_shift, standardize
from internvit.kernels.quantize_rows import outputs, quantization, store_rows

OP = "layer_scale_residual_norm"


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def layer_scale_residual_norm_kernel(
    p_residual, p_branch,  # [M, C]
    p_gamma,  # [C] or None
    p_row_scale,  # [B] or None
    p_weight,  # [C]
    p_bias,  # [C] or None
    p_residual_out, p_normed,  # [M, C]
    p_scale, p_zero,  # [M] or None, with QUANT
    p_mean,  # [M] or None, LayerNorm
    p_rstd,  # [M] or None
    M,
    stride_residual, stride_branch,
    rows_per_image,
    eps,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr, NORM_TYPE: tl.constexpr, ROUNDING: tl.constexpr,
    SMALL_EPS: tl.constexpr, QUANT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = columns(BLOCK_C, p_residual.dtype.element_ty, p_branch.dtype.element_ty)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_residual = load_tile(p_residual, o_rows, in_elements(stride_residual, STRIDE_UNIT), o_cols, m_tile)
    b_branch = load_tile(p_branch, o_rows, in_elements(stride_branch, STRIDE_UNIT), o_cols, m_tile)
    b_weight = load_vector(p_weight, o_cols, C)
    dtype = p_residual_out.dtype.element_ty
    b_sum = add_branch(b_residual, b_branch, p_gamma, p_row_scale, o_rows, m_rows, rows_per_image, o_cols, C).to(dtype)
    store_tile(p_residual_out, o_rows, C, o_cols, m_tile, b_sum)
    b_x_hat, b_mean, b_rstd = standardize(b_sum.to(tl.float32), m_tile, eps, C, NORM_TYPE, SMALL_EPS)
    b_normed = scale_and_shift(b_x_hat, b_weight, p_bias, o_cols, dtype, C, ROUNDING)
    store_rows(p_normed, p_scale, p_zero, o_rows, m_rows, o_cols, m_tile, b_normed, C, QUANT)
    if p_rstd is not None:
        tl.store(p_rstd + o_rows, b_rstd, mask=m_rows)
    if p_mean is not None:
        tl.store(p_mean + o_rows, b_mean, mask=m_rows)


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def layer_scale_residual_norm_backward_kernel(
    p_grad_residual_out,  # [M, C] or None
    p_grad_normed, p_residual_out,  # [M, C]
    p_branch,  # [M, C], for gamma's gradient
    p_gamma,  # [C] or None
    p_row_scale,  # [B] or None
    p_weight,  # [C]
    p_mean,  # [M] or None, LayerNorm
    p_rstd,  # [M]
    p_grad_residual, p_grad_branch,  # [M, C] or None
    p_partials,  # [sums, programs, C] float32: gamma's, weight's, bias's
    M,
    stride_grad_residual_out, stride_grad_normed, stride_residual_out, stride_branch,
    rows_per_image,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr, NORM_TYPE: tl.constexpr,
    GAMMA_SUM: tl.constexpr, WEIGHT_SUM: tl.constexpr, BIAS_SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = columns(BLOCK_C, p_residual_out.dtype.element_ty, p_grad_normed.dtype.element_ty)
    stride_grad_residual_out = in_elements(stride_grad_residual_out, STRIDE_UNIT)
    stride_grad_normed = in_elements(stride_grad_normed, STRIDE_UNIT)
    stride_residual_out = in_elements(stride_residual_out, STRIDE_UNIT)
    stride_branch = in_elements(stride_branch, STRIDE_UNIT)
    b_weight = load_vector(p_weight, o_cols, C)
    b_gamma_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    b_weight_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    b_bias_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        o_rows, m_rows, m_tile = row_tile(i_tile, M, o_cols, C, ROWS)
        b_x_hat, b_rstd = load_x_hat(  # before grad_normed: after it, Triton 3.9 spilled 8 bytes without sums on sm_90
            p_residual_out, p_mean, p_rstd, o_rows, m_rows, stride_residual_out, o_cols, m_tile, NORM_TYPE
        )
        b_grad_normed = load_tile(p_grad_normed, o_rows, stride_grad_normed, o_cols, m_tile)
        b_grad = norm_backward(b_grad_normed, b_x_hat, b_weight, b_rstd, C, NORM_TYPE)
        if WEIGHT_SUM:  # after grad: before it, sm_90 spilled 8 bytes where gamma is frozen
            b_weight_sum = tl.fma(b_grad_normed, b_x_hat, b_weight_sum)
        if p_grad_residual_out is not None:
            b_grad += load_tile(p_grad_residual_out, o_rows, stride_grad_residual_out, o_cols, m_tile)
        if p_grad_residual is not None:
            store_tile(p_grad_residual, o_rows, C, o_cols, m_tile, b_grad)
        b_grad *= load_row_scale(p_row_scale, o_rows, m_rows, rows_per_image)[:, None]
        if p_grad_branch is not None:
            # read again for each tile: kept in registers, 150 of them at C = 3200 instead of 128 leave room for one
            # program on a multiprocessor instead of two
            b_gamma = load_gamma(p_gamma, o_cols, C)
            store_tile(p_grad_branch, o_rows, C, o_cols, m_tile, b_grad * b_gamma[None, :])
        if GAMMA_SUM:  # after the store: loaded before it, the branch spilled 4 bytes at C = 3200 on sm_100
            b_branch = load_tile(p_branch, o_rows, stride_branch, o_cols, m_tile)
            b_gamma_sum = tl.fma(b_grad, b_branch, b_gamma_sum)
        if BIAS_SUM:  # last: before the stores, Triton 3.9 spilled 8 bytes on sm_120
            b_bias_sum += b_grad_normed
    if GAMMA_SUM:
        store_partial(p_partials, 0, b_gamma_sum, o_cols, C)
    if WEIGHT_SUM:
        store_partial(p_partials, 1 if GAMMA_SUM else 0, b_weight_sum, o_cols, C)
    if BIAS_SUM:
        store_partial(p_partials, (1 if GAMMA_SUM else 0) + (1 if WEIGHT_SUM else 0), b_bias_sum, o_cols, C)


@rows.configured(OP)
def layer_scale_residual_norm(
    config: rows.RowConfig,
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm_type: str,
    rounding: str,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    residual_out, normed = rows.contiguous_like(residual), rows.contiguous_like(branch)
    rstd = rows.empty_statistics(residual, residual.shape[:-1])
    mean = torch.empty_like(rstd) if norm_type == "layer_norm" else None
    written = (residual_out, normed, None, None, mean, rstd)
    read = (residual, branch, gamma, row_scale, weight, bias)
    _launch(config, read, written, eps, norm_type, rounding if norm_type == "rms_norm" else "fused", "none")
    return residual_out, normed, mean, rstd


@rows.configured(f"{OP}_quant")
def layer_scale_residual_norm_quant(
    config: rows.RowConfig,
    residual: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm_type: str,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    residual_out = rows.contiguous_like(residual)
    x_q, scale, zero, x_bytes = outputs(branch, dtype)
    written = (residual_out, x_bytes, scale, zero, None, None)
    read = (residual, branch, gamma, row_scale, weight, bias)
    _launch(config, read, written, eps, norm_type, "fused", quantization(symmetric, dtype))
    return residual_out, x_q, scale, zero


def _launch(
    config: rows.RowConfig,
    read: tuple[Any, ...],
    written: tuple[Tensor | None, ...],
    eps: float,
    norm_type: str,
    rounding: str,
    quant: str,
) -> None:
    residual, branch, gamma, row_scale, weight, bias = read
    residual_rows, branch_rows = rows.dense_rows(residual), rows.dense_rows(branch)
    M, C = rows.size(residual_rows)
    strides, unit = row_strides(residual_rows, branch_rows)
    launch.run(
        layer_scale_residual_norm_kernel,
        (cdiv(M, config.rows),),
        *(residual_rows, branch_rows, rows.contiguous(gamma), rows.contiguous(row_scale)),
        *(weight.contiguous(), rows.contiguous(bias), *written),
        *(M, *strides, rows_per_image(M, row_scale), eps),
        STRIDE_UNIT=unit,
        NORM_TYPE=norm_type,
        ROUNDING=rounding,
        SMALL_EPS=is_small(eps),
        QUANT=quant,
        **config.constants(C),
    )


@rows.configured(f"{OP}_backward", by=2)  # of residual_out
def layer_scale_residual_norm_backward(
    config: rows.RowConfig,
    grad_residual_out: Tensor | None,
    grad_normed: Tensor,
    residual_out: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_type: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    grad_rows = None if grad_residual_out is None else rows.dense_rows(grad_residual_out)
    branch_rows = None if branch is None or not output_mask[2] else rows.dense_rows(branch)
    grad_normed_rows, x_rows = rows.dense_rows(grad_normed), rows.dense_rows(residual_out)
    M, C = rows.size(x_rows)
    programs = rows.persistent_programs(M, config, launch.target_of(residual_out))
    grad_residual = rows.contiguous_like(residual_out) if output_mask[0] else None
    grad_branch = rows.contiguous_like(grad_normed) if output_mask[1] else None
    partials = residual_out.new_empty((sum(output_mask[2:]), programs, C), dtype=torch.float32)
    strides, unit = row_strides(grad_rows, grad_normed_rows, x_rows, branch_rows)
    launch.run(
        layer_scale_residual_norm_backward_kernel,
        (programs if any(output_mask) else 0,),
        *(grad_rows, grad_normed_rows, x_rows, branch_rows, rows.contiguous(gamma), rows.contiguous(row_scale)),
        *(weight.contiguous(), mean.contiguous() if norm_type == "layer_norm" else None, rstd.contiguous()),
        *(grad_residual, grad_branch, partials),
        *(M, *strides, rows_per_image(M, row_scale)),
        STRIDE_UNIT=unit,
        NORM_TYPE=norm_type,
        GAMMA_SUM=output_mask[2],
        WEIGHT_SUM=output_mask[3],
        BIAS_SUM=output_mask[4],
        **config.constants(C),
    )
    parameters = zip((gamma, weight, weight), output_mask[2:], strict=True)
    return grad_residual, grad_branch, *rows.sum_partials(partials, *(p if asked else None for p, asked in parameters))
