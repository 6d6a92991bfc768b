"""RMSNorm and LayerNorm of rows: one kernel forward and one backward; LayerNorm is RMSNorm of the centred row.

    x_hat = (x - mean) * rstd,  rstd = 1 / sqrt(mean((x - mean)^2) + eps),  y = x_hat * weight + bias
    grad_x = rstd * (g - x_hat * mean(g * x_hat) - mean(g)),  g = grad_y * weight

RMSNorm takes mean = 0 and drops mean(g). Forward reads x once and writes y and one or two float32 a row. The device
functions here are also the norm of `layer_scale_residual_norm` and `qk_norm`. A gradient that is not asked for is None.
With QUANT, y is written as int8 or float8 with a scale a row (`quantize_rows`), from float32, and no statistics are.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch, rows
from internvit.kernels.common.rows import load_tile, load_vector, product, row_tile, store_partial, store_tile
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.strides import in_elements, row_strides
from internvit.kernels.quantize_rows import outputs, quantization, store_rows

LEAST_EPS = 1e-29


def is_small(eps: float) -> bool:
    """Whether `eps` does not hide the squares that float32 has no digits for, of |x| < 1e-19."""
    return eps < LEAST_EPS


@triton.jit
def standardize(b_x, m_tile, eps, C: tl.constexpr, NORM_TYPE: tl.constexpr, SMALL_EPS: tl.constexpr):
    """x_hat [ROWS, BLOCK_C], mean [ROWS] and rstd [ROWS] of rows held whole.

    Squares are divided by C before they are summed, so that |x| up to 1e18 stays finite in float32. What rounding left
    in the mean is subtracted a second time: with values around 30 the few that lie next to the mean were off by up to
    14 ulp in bfloat16 without it.

    SMALL_EPS: squares are those of x over the sum of |x|. Rows of 1e-20 have no mean square in float32, and the
    instruction behind `rsqrt` takes a denormal one for 0: x_hat was infinite. A row of zeros gives NaN for eps = 0, as
    in PyTorch.
    """
    if SMALL_EPS:
        b_shrink = tl.minimum(1.0 / tl.sum(tl.abs(b_x), 1), 1152921504606846976.0)  # 2^60: eps * b_shrink^2 is finite
    b_mean = tl.sum(b_x, 1) / C
    if NORM_TYPE == "layer_norm":
        b_x = tl.where(m_tile, b_x - b_mean[:, None], 0.0)
        b_rest = tl.sum(b_x, 1) / C
        b_x = tl.where(m_tile, b_x - b_rest[:, None], 0.0)
        b_mean += b_rest
    if SMALL_EPS:
        b_small = b_x * b_shrink[:, None]
        b_variance = tl.sum(product(b_small, b_small * (1.0 / C)), 1)
        b_rstd = tl.rsqrt(tl.fma(eps * b_shrink, b_shrink, b_variance)) * b_shrink
    else:
        b_rstd = tl.rsqrt(tl.sum(product(b_x, b_x * (1.0 / C)), 1) + eps)
    return b_x * b_rstd[:, None], b_mean, b_rstd


@triton.jit
def scale_and_shift(b_x_hat, b_weight, p_bias, o_cols, dtype, C: tl.constexpr, ROUNDING: tl.constexpr):
    """x_hat * weight + bias; ROUNDING "reference" rounds x_hat to `dtype` first and the product after, as upstream's
    RMSNorm does, which has no bias."""
    if ROUNDING == "reference":
        b_y = (b_x_hat.to(dtype).to(tl.float32) * b_weight[None, :]).to(dtype).to(tl.float32)
    else:
        b_weight = tl.broadcast_to(b_weight[None, :], b_x_hat.shape)
        if p_bias is None:
            b_y = b_x_hat * b_weight
        else:
            b_y = tl.fma(b_x_hat, b_weight, tl.broadcast_to(load_vector(p_bias, o_cols, C)[None, :], b_x_hat.shape))
    return b_y


@triton.jit
def norm_backward(b_grad_y, b_x_hat, b_weight, b_rstd, C: tl.constexpr, NORM_TYPE: tl.constexpr):
    """grad_x [ROWS, BLOCK_C]; masked columns of grad_y and x_hat hold 0.

    rstd multiplies each term, and the last operation is a fused multiply-add that is spelt out. A product at the end
    would be contracted with what the fused op adds to it (`grad_residual_out`), one rounding fewer than in two ops.
    """
    b_g = b_grad_y * b_weight[None, :]
    b_along = tl.broadcast_to((tl.sum(product(b_g, b_x_hat), 1) / C * b_rstd)[:, None], b_g.shape)
    if NORM_TYPE == "layer_norm":
        b_mean = tl.broadcast_to((tl.sum(b_g, 1) / C * b_rstd)[:, None], b_g.shape)
        b_scaled = tl.fma(b_g, tl.broadcast_to(b_rstd[:, None], b_g.shape), -b_mean)
    else:
        b_scaled = b_g * b_rstd[:, None]
    return tl.fma(b_x_hat, -b_along, b_scaled)


@triton.jit
def load_x_hat(p_x, p_mean, p_rstd, o_rows, m_rows, stride, o_cols, m_tile, NORM_TYPE: tl.constexpr):
    """x_hat [ROWS, BLOCK_C] from saved statistics, and rstd [ROWS]."""
    b_x = load_tile(p_x, o_rows, stride, o_cols, m_tile)
    b_rstd = tl.load(p_rstd + o_rows, mask=m_rows, other=0.0)
    if NORM_TYPE == "layer_norm":
        b_mean = tl.load(p_mean + o_rows, mask=m_rows, other=0.0)
        b_x = tl.where(m_tile, b_x - b_mean[:, None], 0.0)
    return b_x * b_rstd[:, None], b_rstd


@triton.jit(do_not_specialize=["M"])
def norm_kernel(
    p_x,  # [M, C]
    p_weight,  # [C]
    p_bias,  # [C] or None
    p_y,  # [M, C]
    p_scale, p_zero,  # [M] or None, with QUANT
    p_mean,  # [M] or None, LayerNorm
    p_rstd,  # [M] or None
    M,
    stride_x,
    eps,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr, NORM_TYPE: tl.constexpr, ROUNDING: tl.constexpr,
    SMALL_EPS: tl.constexpr, QUANT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_weight = load_vector(p_weight, o_cols, C)
    b_x = load_tile(p_x, o_rows, in_elements(stride_x, STRIDE_UNIT), o_cols, m_tile)
    b_x_hat, b_mean, b_rstd = standardize(b_x, m_tile, eps, C, NORM_TYPE, SMALL_EPS)
    b_y = scale_and_shift(b_x_hat, b_weight, p_bias, o_cols, p_x.dtype.element_ty, C, ROUNDING)
    store_rows(p_y, p_scale, p_zero, o_rows, m_rows, o_cols, m_tile, b_y, C, QUANT)
    if p_rstd is not None:
        tl.store(p_rstd + o_rows, b_rstd, mask=m_rows)
    if p_mean is not None:
        tl.store(p_mean + o_rows, b_mean, mask=m_rows)


@triton.jit(do_not_specialize=["M"])
def norm_backward_kernel(
    p_grad_y, p_x,  # [M, C]
    p_weight,  # [C]
    p_mean,  # [M] or None, LayerNorm
    p_rstd,  # [M]
    p_grad_x,  # [M, C] or None
    p_partials,  # [sums, programs, C] float32: weight's, then bias's
    M,
    stride_grad_y, stride_x,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr, NORM_TYPE: tl.constexpr,
    WEIGHT_SUM: tl.constexpr, BIAS_SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    stride_grad_y = in_elements(stride_grad_y, STRIDE_UNIT)
    stride_x = in_elements(stride_x, STRIDE_UNIT)
    b_weight = load_vector(p_weight, o_cols, C)
    b_weight_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    b_bias_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        o_rows, m_rows, m_tile = row_tile(i_tile, M, o_cols, C, ROWS)
        b_grad_y = load_tile(p_grad_y, o_rows, stride_grad_y, o_cols, m_tile)
        b_x_hat, b_rstd = load_x_hat(p_x, p_mean, p_rstd, o_rows, m_rows, stride_x, o_cols, m_tile, NORM_TYPE)
        if p_grad_x is not None:
            b_grad_x = norm_backward(b_grad_y, b_x_hat, b_weight, b_rstd, C, NORM_TYPE)
            store_tile(p_grad_x, o_rows, C, o_cols, m_tile, b_grad_x)
        if WEIGHT_SUM:
            b_weight_sum = tl.fma(b_grad_y, b_x_hat, b_weight_sum)
        if BIAS_SUM:
            b_bias_sum += b_grad_y
    if WEIGHT_SUM:
        store_partial(p_partials, 0, b_weight_sum, o_cols, C)
    if BIAS_SUM:
        store_partial(p_partials, 1 if WEIGHT_SUM else 0, b_bias_sum, o_cols, C)


def norm(
    config: rows.RowConfig, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, norm_type: str, rounding: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, mean (None for RMSNorm), rstd."""
    y = rows.contiguous_like(x)
    rstd = rows.empty_statistics(x, x.shape[:-1])
    mean = torch.empty_like(rstd) if norm_type == "layer_norm" else None
    _launch(config, x, weight, bias, (y, None, None, mean, rstd), eps, norm_type, rounding, "none")
    return y, mean, rstd


def norm_quant(
    config: rows.RowConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    norm_type: str,
    symmetric: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_q, x_scale, x_zero."""
    x_q, scale, zero, x_bytes = outputs(x, dtype)
    written = (x_bytes, scale, zero, None, None)
    _launch(config, x, weight, bias, written, eps, norm_type, "fused", quantization(symmetric, dtype))
    return x_q, scale, zero


def _launch(
    config: rows.RowConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    written: tuple[Tensor | None, ...],
    eps: float,
    norm_type: str,
    rounding: str,
    quant: str,
) -> None:
    x_rows = rows.dense_rows(x)
    M, C = rows.size(x_rows)
    strides, unit = row_strides(x_rows)
    launch.run(
        norm_kernel,
        (cdiv(M, config.rows),),
        *(x_rows, weight.contiguous(), rows.contiguous(bias), *written),
        *(M, *strides, eps),
        STRIDE_UNIT=unit,
        NORM_TYPE=norm_type,
        ROUNDING=rounding,
        SMALL_EPS=is_small(eps),
        QUANT=quant,
        **config.constants(C),
    )


def norm_gradients(
    config: rows.RowConfig,
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    norm_type: str,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """grad_x, grad_weight, grad_bias; None where `output_mask` is False."""
    grad_rows, x_rows = rows.dense_rows(grad_y), rows.dense_rows(x)
    M, C = rows.size(x_rows)
    programs = rows.persistent_programs(M, config, launch.target_of(x))
    grad_x = rows.contiguous_like(x) if output_mask[0] else None
    partials = x.new_empty((output_mask[1] + output_mask[2], programs, C), dtype=torch.float32)
    strides, unit = row_strides(grad_rows, x_rows)
    launch.run(
        norm_backward_kernel,
        (programs if any(output_mask) else 0,),
        *(grad_rows, x_rows, weight.contiguous(), rows.contiguous(mean), rstd.contiguous(), grad_x, partials),
        *(M, *strides),
        STRIDE_UNIT=unit,
        NORM_TYPE=norm_type,
        WEIGHT_SUM=output_mask[1],
        BIAS_SUM=output_mask[2],
        **config.constants(C),
    )
    grad_weight, grad_bias = rows.sum_partials(partials, *(weight if asked else None for asked in output_mask[1:]))
    return grad_x, grad_weight, grad_bias


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    y, _, rstd = rows.call("rms_norm", x.shape[-1], x, norm, x, weight, None, eps, "rms_norm", rounding)
    return y, rstd


def rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    args = (grad_y, x, weight, None, rstd, "rms_norm", (*output_mask, False))
    return rows.call("rms_norm_backward", x.shape[-1], x, norm_gradients, *args)[:2]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return rows.call("layer_norm", x.shape[-1], x, norm, x, weight, bias, eps, "layer_norm", "fused")


def rms_norm_quant(
    x: Tensor, weight: Tensor, eps: float, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    args = (x, weight, None, eps, "rms_norm", symmetric, dtype)
    return rows.call("rms_norm_quant", x.shape[-1], x, norm_quant, *args)


def layer_norm_quant(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    args = (x, weight, bias, eps, "layer_norm", symmetric, dtype)
    return rows.call("layer_norm_quant", x.shape[-1], x, norm_quant, *args)


def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    args = (grad_y, x, weight, mean, rstd, "layer_norm", output_mask)
    return rows.call("layer_norm_backward", x.shape[-1], x, norm_gradients, *args)
