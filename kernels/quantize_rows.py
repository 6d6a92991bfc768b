"""Rows as int8 or float8_e4m3fn with a scale and a zero point each: of x, of its GELU, and as the norms' epilogue.

    span = max |x|, or max(x, 0) - min(x, 0) with a zero point;  x_scale = span / steps,  steps = 127, 255 or 448
    x_q = round(x * (steps / span)) + x_zero                      reads 1, writes a byte an element and 8 a row

A row is in registers when its span is known. float8 is written as bytes, by integer arithmetic: every target has it,
also those without the type. Quotients are rounded to nearest (`div_rn`), so that scales have the reference's bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch, rows
from internvit.kernels.common.rows import load_tile, row_tile, store_tile
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.strides import in_elements, row_strides
from internvit.kernels.gelu import exact_gelu

LEAST_SPAN = tl.constexpr(1e-30)


@triton.jit
def nearest(b_x):
    """The nearest integers, ties to even, of |x| < 2^22. The sum with 2^23 leaves them in the low bits; of |x|, for x
    is a product that the compiler would else round together with the sum."""
    b_whole = (tl.abs(b_x) + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(b_x < 0, -b_whole, b_whole)


@triton.jit
def e4m3_bits(b_x):
    """The nearest float8_e4m3fn, ties to even, at most 448. Below 2^-6 values are multiples of 2^-9: the sum with 2^14
    leaves the multiple in the low bits."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    b_size = tl.abs(b_x)
    b_magnitude = b_bits & 0x7FFFFFFF
    b_normal = (b_magnitude + 0x7FFFF + ((b_magnitude >> 20) & 1) - 0x3C000000) >> 20
    b_small = (b_size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    b_code = tl.where(b_size < 0.015625, b_small, tl.where(b_size < 448.0, b_normal, 0x7E))
    return b_code | ((b_bits >> 24) & 0x80)


@triton.jit
def quantize_tile(b_x, QUANT: tl.constexpr):
    """x_q [ROWS, BLOCK_C] int8 bits, x_scale and x_zero [ROWS] of rows held whole; masked columns hold 0."""
    b_ends = tl.where(tl.abs(b_x) < float("inf"), b_x, float("inf"))
    b_low = tl.max(tl.maximum(-b_ends, 0.0), 1)
    b_high = tl.max(tl.maximum(b_ends, 0.0), 1)
    if QUANT == "int8_asymmetric":
        b_span = b_high + b_low
        b_steps = tl.zeros_like(b_span) + 255.0
    else:
        b_span = tl.maximum(b_low, b_high)
        b_steps = tl.zeros_like(b_span) + (127.0 if QUANT == "int8" else 448.0)
    m_zero = b_span < LEAST_SPAN
    m_finite = b_span < float("inf")
    b_divisor = tl.where(m_zero | (b_span == float("inf")), 1.0, b_span)
    b_inverse = tl.where(m_finite & (b_span >= LEAST_SPAN), tl.div_rn(b_steps, b_divisor), 0.0)
    b_scale = tl.where(m_finite, tl.div_rn(b_divisor, b_steps), float("nan"))
    b_scale = tl.where(m_zero, 0.0, b_scale)
    b_zero = tl.zeros_like(b_span).to(tl.int32)
    if QUANT == "int8_asymmetric":
        b_zero = tl.where(b_inverse > 0, nearest(b_low * b_inverse) - 128, 0)
    b_x *= b_inverse[:, None]
    b_x = tl.where(b_x == b_x, b_x, 0.0)  # of a row that is not finite
    if QUANT == "float8":
        b_q = e4m3_bits(b_x)
    else:
        b_q = tl.minimum(tl.maximum(nearest(b_x) + b_zero[:, None], -128), 127)
    return b_q.to(tl.int8), b_scale, b_zero


@triton.jit
def store_rows(
    p_y, p_scale, p_zero, o_rows, m_rows, o_cols, m_tile, b_y, C: tl.constexpr, QUANT: tl.constexpr
):  # fmt: skip
    """y [ROWS, BLOCK_C] in its dtype; with QUANT as int8 or float8, and its scales and zero points [ROWS]."""
    if QUANT == "none":
        store_tile(p_y, o_rows, C, o_cols, m_tile, b_y)
    else:
        b_q, b_scale, b_zero = quantize_tile(b_y, QUANT)
        tl.store(p_y + o_rows[:, None] * C + o_cols[None, :], b_q, mask=m_tile)
        tl.store(p_scale + o_rows, b_scale, mask=m_rows)
        tl.store(p_zero + o_rows, b_zero, mask=m_rows)


@triton.jit(do_not_specialize=["M"])
def quantize_rows_kernel(
    p_x,  # [M, C]
    p_x_q,  # [M, C] int8 bits
    p_scale, p_zero,  # [M]
    M,
    stride_x,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr, GELU: tl.constexpr, QUANT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_x = load_tile(p_x, o_rows, in_elements(stride_x, STRIDE_UNIT), o_cols, m_tile)
    if GELU:
        b_x = exact_gelu(b_x)
    store_rows(p_x_q, p_scale, p_zero, o_rows, m_rows, o_cols, m_tile, b_x, C, QUANT)


def quantization(symmetric: bool, dtype: torch.dtype) -> str:
    """QUANT of the kernels."""
    if dtype != torch.int8:
        return "float8"
    return "int8" if symmetric else "int8_asymmetric"


def outputs(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_q, x_scale, x_zero for rows of x, and x_q as the kernels write it, by the byte."""
    x_q = x.new_empty(x.shape, dtype=torch.int8)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x_q.view(dtype), scale, x.new_empty(x.shape[:-1], dtype=torch.int32), x_q


def quantize_rows(
    config: rows.RowConfig, x: Tensor, symmetric: bool, dtype: torch.dtype, gelu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x_rows = rows.as_rows(x)
    M, C = x_rows.shape
    x_q, scale, zero, x_bytes = outputs(x, dtype)
    strides, unit = row_strides(x_rows)
    launch.run(
        quantize_rows_kernel,
        (cdiv(M, config.rows),),
        *(x_rows, x_bytes, scale, zero, M, *strides),
        STRIDE_UNIT=unit,
        GELU=gelu,
        QUANT=quantization(symmetric, dtype),
        **config.constants(C),
    )
    return x_q, scale, zero


def per_token_quant(x: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return rows.call("per_token_quant", x.shape[-1], x, quantize_rows, x, symmetric, dtype, False)


def gelu_quant(pre_activation: Tensor, symmetric: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    args = (pre_activation, symmetric, dtype, True)
    return rows.call("gelu_quant", pre_activation.shape[-1], pre_activation, quantize_rows, *args)
