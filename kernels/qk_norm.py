"""QK-norm in memory on a GPU: RMSNorm of q and of k over all heads together, read by their strides.

    q_normed = q * rstd_q * q_weight,  the same for k                                        reads 2, writes 2

Backward is RMSNorm's for each of the two (`norm.py`).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import rows
from internvit.kernels.common.heads import dense_heads, load_heads, run_heads
from internvit.kernels.common.rows import RowConfig, load_vector, row_tile, store_tile
from internvit.kernels.norm import is_small, norm_gradients, scale_and_shift, standardize

OP = "qk_norm"


@triton.jit
def normalize_heads(
    p_x, p_weight, p_y, p_rstd,
    M, N,
    stride_b, stride_n, stride_h,
    eps,
    C: tl.constexpr, D: tl.constexpr, STRIDE_UNIT: tl.constexpr, ADJACENT: tl.constexpr, ROUNDING: tl.constexpr,
    SMALL_EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_weight = load_vector(p_weight, o_cols, C)
    b_x = load_heads(p_x, o_rows, N, stride_b, stride_n, stride_h, o_cols, m_tile, D, STRIDE_UNIT, ADJACENT)
    b_x_hat, _, b_rstd = standardize(b_x, m_tile, eps, C, "rms_norm", SMALL_EPS)
    b_y = scale_and_shift(b_x_hat, b_weight, None, o_cols, p_x.dtype.element_ty, C, ROUNDING)
    store_tile(p_y, o_rows, C, o_cols, m_tile, b_y)
    tl.store(p_rstd + o_rows, b_rstd, mask=m_rows)


@triton.jit(do_not_specialize=["M", "N"])
def qk_norm_kernel(
    p_q, p_k,  # [B, N, H, D]
    p_q_weight, p_k_weight,  # [C]
    p_q_normed, p_k_normed,  # [B, N, C]
    p_rstd_q, p_rstd_k,  # [B, N]
    M, N,
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    eps,
    C: tl.constexpr, D: tl.constexpr, STRIDE_UNIT: tl.constexpr, ADJACENT: tl.constexpr, ROUNDING: tl.constexpr,
    SMALL_EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # fmt: off
    normalize_heads(p_q, p_q_weight, p_q_normed, p_rstd_q, M, N,
                    stride_qb, stride_qn, stride_qh, eps, C, D, STRIDE_UNIT, ADJACENT, ROUNDING,
                    SMALL_EPS, ROWS, BLOCK_C)
    normalize_heads(p_k, p_k_weight, p_k_normed, p_rstd_k, M, N,
                    stride_kb, stride_kn, stride_kh, eps, C, D, STRIDE_UNIT, ADJACENT, ROUNDING,
                    SMALL_EPS, ROWS, BLOCK_C)
    # fmt: on


def normalize_qk(
    config: RowConfig, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = dense_heads(q), dense_heads(k)
    q_normed, k_normed = rows.contiguous_like(q), rows.contiguous_like(k)
    rstd_q = rows.empty_statistics(q, q.shape[:2])
    rstd_k = torch.empty_like(rstd_q)
    pointers = (q, k, q_weight.contiguous(), k_weight.contiguous(), q_normed, k_normed, rstd_q, rstd_k)
    run_heads(qk_norm_kernel, config, pointers, (q, k), eps, ROUNDING=rounding, SMALL_EPS=is_small(eps))
    return q_normed, k_normed, rstd_q, rstd_k


def qk_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return rows.call(OP, q.shape[2] * q.shape[3], q, normalize_qk, q, k, q_weight, k_weight, eps, rounding)


def qk_norm_backward(
    grad_q_normed: Tensor,
    grad_k_normed: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    def gradients(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *mask: bool) -> tuple[Tensor | None, ...]:
        args = (grad.flatten(2), x.flatten(2), weight, None, rstd, "rms_norm", (*mask, False))
        grad_x, grad_weight, _ = rows.call(f"{OP}_backward", weight.numel(), x, norm_gradients, *args)
        return None if grad_x is None else grad_x.view(x.shape), grad_weight

    grad_q, grad_q_weight = gradients(grad_q_normed, q, q_weight, rstd_q, output_mask[0], output_mask[2])
    grad_k, grad_k_weight = gradients(grad_k_normed, k, k_weight, rstd_k, output_mask[1], output_mask[3])
    return grad_q, grad_k, grad_q_weight, grad_k_weight
