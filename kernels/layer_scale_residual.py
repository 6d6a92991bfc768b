"""The end of a block's branch on a GPU.

    residual_out = residual + row_scale[b] * gamma * branch                         reads 2, writes 1
    grad_branch = row_scale[b] * gamma * grad,  grad_gamma = sum of row_scale[b] * branch * grad over rows

residual, branch [M, C]; gamma [C] or None; row_scale [B] or None, one factor for every M / B rows.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch, rows
from internvit.kernels.common.rows import columns, load_tile, load_vector, row_tile, store_partial, store_tile
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.strides import in_elements, row_strides

OP = "layer_scale_residual"


# A `return` inside an `if` on a constant does not end a Triton function: what follows it is compiled too, with the
# pointer that is None. Optional pointers take both arms of one `if` and a single exit.
@triton.jit
def load_gamma(p_gamma, o_cols, C: tl.constexpr):
    """gamma [BLOCK_C], 1 where it is folded away."""
    if p_gamma is None:
        b_gamma = tl.full([o_cols.shape[0]], 1.0, tl.float32)
    else:
        b_gamma = load_vector(p_gamma, o_cols, C)
    return b_gamma


@triton.jit
def load_row_scale(p_row_scale, o_rows, m_rows, rows_per_image):
    """The factor of each row's image [ROWS], 1 without DropPath."""
    if p_row_scale is None:
        b_scale = tl.full([o_rows.shape[0]], 1.0, tl.float32)
    else:
        b_scale = tl.load(p_row_scale + o_rows // rows_per_image, mask=m_rows, other=0.0).to(tl.float32)
    return b_scale


@triton.jit
def add_branch(b_residual, b_branch, p_gamma, p_row_scale, o_rows, m_rows, rows_per_image, o_cols, C: tl.constexpr):
    """residual + row_scale[b] * gamma * branch. The fused multiply-add is spelt out: left to the compiler, two kernels
    may contract the same formula differently, and this op and `layer_scale_residual_norm` would differ in bits."""
    b_gamma = load_gamma(p_gamma, o_cols, C)[None, :]
    if p_row_scale is None:
        b_out = tl.fma(b_branch, tl.broadcast_to(b_gamma, b_branch.shape), b_residual)
    else:
        b_scale = load_row_scale(p_row_scale, o_rows, m_rows, rows_per_image)[:, None]
        b_out = tl.fma(b_branch * b_gamma, tl.broadcast_to(b_scale, b_branch.shape), b_residual)
    return b_out


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def layer_scale_residual_kernel(
    p_residual, p_branch,  # [M, C]
    p_gamma,  # [C] or None
    p_row_scale,  # [B] or None
    p_out,  # [M, C]
    M,
    stride_residual, stride_branch,
    rows_per_image,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = columns(BLOCK_C, p_residual.dtype.element_ty, p_branch.dtype.element_ty)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_residual = load_tile(p_residual, o_rows, in_elements(stride_residual, STRIDE_UNIT), o_cols, m_tile)
    b_branch = load_tile(p_branch, o_rows, in_elements(stride_branch, STRIDE_UNIT), o_cols, m_tile)
    b_out = add_branch(b_residual, b_branch, p_gamma, p_row_scale, o_rows, m_rows, rows_per_image, o_cols, C)
    store_tile(p_out, o_rows, C, o_cols, m_tile, b_out)


@triton.jit(do_not_specialize=["M", "rows_per_image"])
def layer_scale_residual_backward_kernel(
    p_grad,  # [M, C]
    p_branch,  # [M, C], for gamma's gradient
    p_gamma,  # [C] or None
    p_row_scale,  # [B] or None
    p_grad_branch,  # [M, C] or None
    p_partials,  # [1, programs, C] float32
    M,
    stride_grad, stride_branch,
    rows_per_image,
    C: tl.constexpr, STRIDE_UNIT: tl.constexpr, GAMMA_SUM: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    stride_grad = in_elements(stride_grad, STRIDE_UNIT)
    stride_branch = in_elements(stride_branch, STRIDE_UNIT)
    b_gamma = load_gamma(p_gamma, o_cols, C)
    b_gamma_sum = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i_tile in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        o_rows, m_rows, m_tile = row_tile(i_tile, M, o_cols, C, ROWS)
        # both loads before the store: 72 registers at C = 3200 on sm_100; with the sum first, Triton 3.9 spilled one
        b_grad = load_tile(p_grad, o_rows, stride_grad, o_cols, m_tile)
        if GAMMA_SUM:
            b_branch = load_tile(p_branch, o_rows, stride_branch, o_cols, m_tile)
        b_grad *= load_row_scale(p_row_scale, o_rows, m_rows, rows_per_image)[:, None]
        if p_grad_branch is not None:
            store_tile(p_grad_branch, o_rows, C, o_cols, m_tile, b_grad * b_gamma[None, :])
        if GAMMA_SUM:
            b_gamma_sum = tl.fma(b_grad, b_branch, b_gamma_sum)
    if GAMMA_SUM:
        store_partial(p_partials, 0, b_gamma_sum, o_cols, C)


def rows_per_image(row_count: int, row_scale: Tensor | None) -> int:
    return 1 if row_scale is None else row_count // max(1, row_scale.numel())


@rows.configured(OP)
def layer_scale_residual(
    config: rows.RowConfig, residual: Tensor, branch: Tensor, gamma: Tensor | None, row_scale: Tensor | None
) -> Tensor:
    residual_rows, branch_rows = rows.dense_rows(residual), rows.dense_rows(branch)
    M, C = rows.size(residual_rows)
    out = rows.contiguous_like(residual)
    strides, unit = row_strides(residual_rows, branch_rows)
    launch.run(
        layer_scale_residual_kernel,
        (cdiv(M, config.rows),),
        *(residual_rows, branch_rows, rows.contiguous(gamma), rows.contiguous(row_scale), out),
        *(M, *strides, rows_per_image(M, row_scale)),
        STRIDE_UNIT=unit,
        **config.constants(C),
    )
    return out


@rows.configured(f"{OP}_backward")
def layer_scale_residual_backward(
    config: rows.RowConfig,
    grad_out: Tensor,
    branch: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    branch_dtype: torch.dtype,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    grad_rows = rows.dense_rows(grad_out)
    branch_rows = None if branch is None or not output_mask[1] else rows.dense_rows(branch)
    M, C = rows.size(grad_rows)
    programs = rows.persistent_programs(M, config, launch.target_of(grad_out))
    grad_branch = rows.contiguous_like(grad_out, branch_dtype) if output_mask[0] else None
    partials = grad_out.new_empty((int(output_mask[1]), programs, C), dtype=torch.float32)
    strides, unit = row_strides(grad_rows, branch_rows)
    launch.run(
        layer_scale_residual_backward_kernel,
        (programs if any(output_mask) else 0,),
        *(grad_rows, branch_rows, rows.contiguous(gamma), rows.contiguous(row_scale), grad_branch, partials),
        *(M, *strides, rows_per_image(M, row_scale)),
        STRIDE_UNIT=unit,
        GAMMA_SUM=output_mask[1],
        **config.constants(C),
    )
    (grad_gamma,) = rows.sum_partials(partials, gamma if output_mask[1] else None)
    return grad_branch, grad_gamma
