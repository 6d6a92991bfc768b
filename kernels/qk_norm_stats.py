"""QK-norm's statistics on a GPU: one pass over q and k by their strides.

    rstd_q[b, n] = 1 / sqrt(mean over (h, d) of q[b, n, h, d]^2 + eps),  the same for k      reads 2
    grad_x -= grad_rstd * rstd^3 / C * x                                                     reads 4, writes 2, in place

A token's C = H * D values are one row; its heads may lie apart, as in a transposed [B, H, N, D].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch
from internvit.kernels.common.rows import row_launch, row_tile
from internvit.kernels.norm import standardize

OP = "qk_norm_stats"


@triton.jit
def head_offsets(o_rows, N, stride_b, stride_n, stride_h, o_cols, D: tl.constexpr, ADJACENT: tl.constexpr):
    """Offsets [ROWS, BLOCK_C] of tokens o_rows and columns h * D + d; ADJACENT: heads lie side by side."""
    o_token = (o_rows // N) * stride_b + (o_rows % N) * stride_n
    if ADJACENT:
        return o_token[:, None] + o_cols[None, :]
    return o_token[:, None] + ((o_cols // D).to(tl.int64) * stride_h + o_cols % D)[None, :]


@triton.jit
def load_heads(p_x, o_rows, N, stride_b, stride_n, stride_h, o_cols, m_tile, D: tl.constexpr, ADJACENT: tl.constexpr):
    o = head_offsets(o_rows, N, stride_b, stride_n, stride_h, o_cols, D, ADJACENT)
    return tl.load(p_x + o, mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def qk_norm_stats_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, N, H, D]
    p_rstd_q,  # [B, N]
    p_rstd_k,  # [B, N]
    M,
    N,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    ADJACENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_rows, o_cols, m_rows, m_tile = row_tile(tl.program_id(0), M, C, ROWS, BLOCK_C)
    b_q = load_heads(p_q, o_rows, N, stride_qb, stride_qn, stride_qh, o_cols, m_tile, D, ADJACENT)
    b_k = load_heads(p_k, o_rows, N, stride_kb, stride_kn, stride_kh, o_cols, m_tile, D, ADJACENT)
    _, _, b_rstd_q = standardize(b_q, m_tile, eps, C, False)
    _, _, b_rstd_k = standardize(b_k, m_tile, eps, C, False)
    tl.store(p_rstd_q + o_rows, b_rstd_q, mask=m_rows)
    tl.store(p_rstd_k + o_rows, b_rstd_k, mask=m_rows)


@triton.jit
def qk_norm_stats_backward_kernel(
    p_grad_rstd,  # [B, N]
    p_x,  # [B, N, H, D]
    p_rstd,  # [B, N]
    p_grad_x,  # [B, N, H, D], added to
    M,
    N,
    stride_xb,
    stride_xn,
    stride_xh,
    stride_gb,
    stride_gn,
    stride_gh,
    C: tl.constexpr,
    D: tl.constexpr,
    ADJACENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_rows, o_cols, m_rows, m_tile = row_tile(tl.program_id(0), M, C, ROWS, BLOCK_C)
    b_rstd = tl.load(p_rstd + o_rows, mask=m_rows, other=0.0)
    b_slope = tl.load(p_grad_rstd + o_rows, mask=m_rows, other=0.0) * b_rstd * b_rstd * (1.0 / C)  # [ROWS]
    b_x = load_heads(p_x, o_rows, N, stride_xb, stride_xn, stride_xh, o_cols, m_tile, D, ADJACENT)
    p_grad = p_grad_x + head_offsets(o_rows, N, stride_gb, stride_gn, stride_gh, o_cols, D, ADJACENT)
    b_grad = tl.load(p_grad, mask=m_tile, other=0.0).to(tl.float32)
    b_grad -= b_slope[:, None] * (b_x * b_rstd[:, None])  # rstd^3 would underflow where |x| is 1e18
    tl.store(p_grad, b_grad.to(p_grad_x.dtype.element_ty), mask=m_tile)


def token_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def heads_adjacent(*tensors: Tensor) -> bool:
    return all(t.stride(2) == t.shape[3] or t.shape[2] == 1 for t in tensors)


def dense_heads(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 128 tokens within an int32 offset, a copy only where it is not so."""
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(1) < 2**24 else x.contiguous()


def qk_norm_stats(q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    q, k = dense_heads(q), dense_heads(k)
    B, N, H, D = q.shape
    choice = row_launch(OP, H * D, launch.target_of(q))
    rstd_q, rstd_k = (q.new_empty((B, N), dtype=torch.float32) for _ in range(2))
    launch.run(
        qk_norm_stats_kernel,
        (triton.cdiv(B * N, choice.rows),),
        *(q, k, rstd_q, rstd_k, B * N, N, *token_strides(q), *token_strides(k), eps),
        C=H * D,
        D=D,
        ADJACENT=heads_adjacent(q, k),
        ROWS=choice.rows,
        BLOCK_C=triton.next_power_of_2(H * D),
        num_warps=choice.warps,
    )
    return rstd_q, rstd_k


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
    B, N, H, D = q.shape
    choice = row_launch(f"{OP}_backward", H * D, launch.target_of(q))
    for grad_rstd, x, rstd, grad_x in ((grad_rstd_q, q, rstd_q, grad_q), (grad_rstd_k, k, rstd_k, grad_k)):
        x = dense_heads(x)
        launch.run(
            qk_norm_stats_backward_kernel,
            (triton.cdiv(B * N, choice.rows),),
            *(grad_rstd.contiguous(), x, rstd.contiguous(), grad_x, B * N, N),
            *(*token_strides(x), *token_strides(grad_x)),
            C=H * D,
            D=D,
            ADJACENT=heads_adjacent(x, grad_x),
            ROWS=choice.rows,
            BLOCK_C=triton.next_power_of_2(H * D),
            num_warps=choice.warps,
        )
