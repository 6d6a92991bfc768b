"""QK-norm in memory on a GPU: RMSNorm of q and of k over all heads together, read by their strides.

    q_normed = q * rstd_q * q_weight,  the same for k                                        reads 2, writes 2

Backward is RMSNorm's for each of the two (`norm.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch
from internvit.kernels.common.rows import load_vector, row_launch, row_tile, store_tile
from internvit.kernels.norm import norm_gradients, scale_and_shift, standardize
from internvit.kernels.qk_norm_stats import dense_heads, heads_adjacent, load_heads, token_strides
from internvit.ops.core.registration import Mask

OP = "qk_norm"


@triton.jit
def normalize_heads(
    p_x,
    p_weight,
    p_y,
    p_rstd,
    M,
    N,
    stride_b,
    stride_n,
    stride_h,
    eps,
    C: tl.constexpr,
    D: tl.constexpr,
    ADJACENT: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_rows, o_cols, m_rows, m_tile = row_tile(tl.program_id(0), M, C, ROWS, BLOCK_C)
    b_weight = load_vector(p_weight, o_cols, C)
    b_x = load_heads(p_x, o_rows, N, stride_b, stride_n, stride_h, o_cols, m_tile, D, ADJACENT)
    b_x_hat, _, b_rstd = standardize(b_x, m_tile, eps, C, False)
    b_y = scale_and_shift(b_x_hat, b_weight, None, o_cols, p_x.dtype.element_ty, C, ROUND_FIRST)
    store_tile(p_y, o_rows, C, o_cols, m_tile, b_y)
    tl.store(p_rstd + o_rows, b_rstd, mask=m_rows)


@triton.jit
def qk_norm_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, N, H, D]
    p_q_weight,  # [C]
    p_k_weight,  # [C]
    p_q_normed,  # [B, N, C]
    p_k_normed,  # [B, N, C]
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
    ROUND_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # fmt: off
    normalize_heads(p_q, p_q_weight, p_q_normed, p_rstd_q, M, N, stride_qb, stride_qn, stride_qh, eps,
                    C, D, ADJACENT, ROUND_FIRST, ROWS, BLOCK_C)
    normalize_heads(p_k, p_k_weight, p_k_normed, p_rstd_k, M, N, stride_kb, stride_kn, stride_kh, eps,
                    C, D, ADJACENT, ROUND_FIRST, ROWS, BLOCK_C)
    # fmt: on


def qk_norm(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k = dense_heads(q), dense_heads(k)
    B, N, H, D = q.shape
    choice = row_launch(OP, H * D, launch.target_of(q))
    q_normed, k_normed = q.new_empty(q.shape), k.new_empty(k.shape)
    rstd_q, rstd_k = (q.new_empty((B, N), dtype=torch.float32) for _ in range(2))
    launch.run(
        qk_norm_kernel,
        (triton.cdiv(B * N, choice.rows),),
        *(q, k, q_weight.contiguous(), k_weight.contiguous(), q_normed, k_normed, rstd_q, rstd_k),
        *(B * N, N, *token_strides(q), *token_strides(k), eps),
        C=H * D,
        D=D,
        ADJACENT=heads_adjacent(q, k),
        ROUND_FIRST=rounding == "reference",
        ROWS=choice.rows,
        BLOCK_C=triton.next_power_of_2(H * D),
        num_warps=choice.warps,
    )
    return q_normed, k_normed, rstd_q, rstd_k


def qk_norm_backward(
    grad_q_normed: Tensor,
    grad_k_normed: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    output_mask: Mask,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = []
    for grad, x, weight, rstd, mask in (
        (grad_q_normed, q, q_weight, rstd_q, (output_mask[0], output_mask[2], False)),
        (grad_k_normed, k, k_weight, rstd_k, (output_mask[1], output_mask[3], False)),
    ):
        args = (grad.flatten(2), x.flatten(2), weight, rstd, rstd, False, mask)
        grad_x, grad_weight, _ = norm_gradients(OP, *args)
        grads.append((grad_x.view(x.shape) if mask[0] else grad_x, grad_weight))
    (grad_q, grad_q_weight), (grad_k, grad_k_weight) = grads
    return grad_q, grad_k, grad_q_weight, grad_k_weight
