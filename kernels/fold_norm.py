"""A norm's weight and bias folded into the Linear behind it: one pass over the Linear's weight.

    folded = weight * norm_weight (- its row's mean)
    folded_bias = bias + weight norm_bias,  weight_sum = sum of folded's columns

A row's mean is taken away for LayerNorm: mean * weight_sum is then small beside x folded^T, whatever x's mean is.
`weight_sum` is of the weight as rounded. Reads a weight and writes one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch, rows
from internvit.kernels.common.rows import load_tile, load_vector, row_tile, store_tile
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.strides import in_elements, row_strides


@triton.jit
def fold_norm_kernel(
    p_weight,  # [M, C]
    p_bias,  # [M] or None
    p_norm_weight,  # [C]
    p_norm_bias,  # [C] or None
    p_folded,  # [M, C]
    p_folded_bias, p_weight_sum,  # [M]
    M,
    stride_weight,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_weight = load_tile(p_weight, o_rows, in_elements(stride_weight, STRIDE_UNIT), o_cols, m_tile)
    b_folded = b_weight * load_vector(p_norm_weight, o_cols, C)[None, :]
    if CENTRED:
        b_folded = tl.where(m_tile, b_folded - (tl.sum(b_folded, 1) / C)[:, None], 0.0)
    b_folded = b_folded.to(p_folded.dtype.element_ty)
    store_tile(p_folded, o_rows, C, o_cols, m_tile, b_folded)
    b_bias = tl.zeros([ROWS], tl.float32)
    if p_bias is not None:
        b_bias += tl.load(p_bias + o_rows, mask=m_rows, other=0.0).to(tl.float32)
    if p_norm_bias is not None:
        b_bias += tl.sum(b_weight * load_vector(p_norm_bias, o_cols, C)[None, :], 1)
    tl.store(p_folded_bias + o_rows, b_bias, mask=m_rows)
    tl.store(p_weight_sum + o_rows, tl.sum(b_folded.to(tl.float32), 1), mask=m_rows)


@rows.configured("fold_norm")
def fold_norm(
    config: rows.RowConfig,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight_rows = rows.dense_rows(weight)
    M, C = rows.size(weight_rows)
    folded = rows.contiguous_like(weight)
    folded_bias = rows.empty_statistics(weight, (M,))
    weight_sum = torch.empty_like(folded_bias)
    strides, unit = row_strides(weight_rows)
    launch.run(
        fold_norm_kernel,
        (cdiv(M, config.rows),),
        *(weight_rows, rows.contiguous(bias), norm_weight.contiguous(), rows.contiguous(norm_bias)),
        *(folded, folded_bias, weight_sum, M, *strides),
        STRIDE_UNIT=unit,
        CENTRED=centred,
        **config.constants(C),
    )
    return folded, folded_bias, weight_sum
