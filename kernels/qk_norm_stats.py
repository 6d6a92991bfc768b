"""QK-norm's statistics on a GPU: one pass over q and k by their strides.

    rstd_q[b, n] = 1 / sqrt(mean over (h, d) of q[b, n, h, d]^2 + eps),  the same for k      reads 2
    grad_x -= grad_rstd * rstd^3 / C * x                                                     reads 4, writes 2, in place

A token's C = H * D values are one row; its heads may lie apart, as in a transposed [B, H, N, D].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import rows
from internvit.kernels.common.heads import dense_heads, head_offsets, load_heads, run_heads
from internvit.kernels.common.rows import RowConfig, row_tile
from internvit.kernels.norm import is_small, standardize

OP = "qk_norm_stats"


@triton.jit(do_not_specialize=["M", "N"])
def qk_norm_stats_kernel(
    p_q, p_k,  # [B, N, H, D]
    p_rstd_q, p_rstd_k,  # [B, N]
    M, N,
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    eps,
    C: tl.constexpr, D: tl.constexpr, STRIDE_UNIT: tl.constexpr, ADJACENT: tl.constexpr,
    SMALL_EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_q = load_heads(p_q, o_rows, N, stride_qb, stride_qn, stride_qh, o_cols, m_tile, D, STRIDE_UNIT, ADJACENT)
    b_k = load_heads(p_k, o_rows, N, stride_kb, stride_kn, stride_kh, o_cols, m_tile, D, STRIDE_UNIT, ADJACENT)
    _, _, b_rstd_q = standardize(b_q, m_tile, eps, C, "rms_norm", SMALL_EPS)
    _, _, b_rstd_k = standardize(b_k, m_tile, eps, C, "rms_norm", SMALL_EPS)
    tl.store(p_rstd_q + o_rows, b_rstd_q, mask=m_rows)
    tl.store(p_rstd_k + o_rows, b_rstd_k, mask=m_rows)


@triton.jit(do_not_specialize=["M", "N"])
def qk_norm_stats_backward_kernel(
    p_grad_rstd,  # [B, N]
    p_x,  # [B, N, H, D]
    p_rstd,  # [B, N]
    p_grad_x,  # [B, N, H, D], added to
    M, N,
    stride_xb, stride_xn, stride_xh,
    stride_gb, stride_gn, stride_gh,
    C: tl.constexpr, D: tl.constexpr, STRIDE_UNIT: tl.constexpr, ADJACENT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    o_cols = tl.arange(0, BLOCK_C)
    o_rows, m_rows, m_tile = row_tile(tl.program_id(0), M, o_cols, C, ROWS)
    b_rstd = tl.load(p_rstd + o_rows, mask=m_rows, other=0.0)
    b_slope = tl.load(p_grad_rstd + o_rows, mask=m_rows, other=0.0) * b_rstd * b_rstd * (1.0 / C)  # [ROWS]
    b_x = load_heads(p_x, o_rows, N, stride_xb, stride_xn, stride_xh, o_cols, m_tile, D, STRIDE_UNIT, ADJACENT)
    p_grad = p_grad_x + head_offsets(o_rows, N, stride_gb, stride_gn, stride_gh, o_cols, D, STRIDE_UNIT, ADJACENT)
    b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
    b_grad -= b_slope[:, None] * (b_x * b_rstd[:, None])  # rstd^3 would underflow where |x| is 1e18
    tl.store(p_grad, b_grad.to(p_grad_x.dtype.element_ty), mask=m_tile)


def statistics(config: RowConfig, q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    q, k = dense_heads(q), dense_heads(k)
    rstd_q = rows.empty_statistics(q, q.shape[:2])
    rstd_k = torch.empty_like(rstd_q)
    run_heads(qk_norm_stats_kernel, config, (q, k, rstd_q, rstd_k), (q, k), eps, SMALL_EPS=is_small(eps))
    return rstd_q, rstd_k


def add_gradient(config: RowConfig, grad_rstd: Tensor, x: Tensor, rstd: Tensor, grad_x: Tensor) -> None:
    x = dense_heads(x)
    pointers = (grad_rstd.contiguous(), x, rstd.contiguous(), grad_x)
    run_heads(qk_norm_stats_backward_kernel, config, pointers, (x, grad_x))


def qk_norm_stats(q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return rows.call(OP, q.shape[2] * q.shape[3], q, statistics, q, k, eps)


def qk_norm_stats_backward(
    grad_rstd_q: Tensor,
    grad_rstd_k: Tensor,
    q: Tensor,
    k: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
) -> None:
    """Adds the gradient that flows through the statistics to grad_q and grad_k, in place."""
    for args in ((grad_rstd_q, q, rstd_q, grad_q), (grad_rstd_k, k, rstd_k, grad_k)):
        rows.call(f"{OP}_backward", q.shape[2] * q.shape[3], q, add_gradient, *args)
