"""Attention's gradient of queries; a program keeps a tile of one head's queries and walks over its keys.

Formulas and the class token are explained in `backward.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.attention.config import AttentionConfig, QKNorm, Sequences, run_tiles
from internvit.kernels.attention.scores import LOG2E, add_product, key_scores, load_head_weight, probabilities, scores
from internvit.kernels.attention.tiles import (
    LAST_AGAIN,
    LONE_ROWS,
    first_row,
    first_token,
    keys_of_sequence,
    load_rows,
    one_head,
    place_of_program,
    store_rows,
)


@triton.jit
def grad_q_step(
    b_grad_q,  # [BLOCK_M, BLOCK_D]
    b_q,  # [BLOCK_M, BLOCK_D]
    b_grad,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], in units of log2
    b_delta,  # [BLOCK_M]
    p_k, p_v, p_rstd_k,
    inverse_unit,
    i_n, N, stride_kn, stride_vn, o_d, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the gradient of a tile of queries."""
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b_k, b_s = key_scores(b_q, p_k, p_rstd_k, i_n, N, stride_kn, o_d, scale_log2, D, BLOCK_N, MASKED)
    b_p = probabilities(b_s - b_lse[:, None], p_rstd_k is not None)
    b_v = load_rows(p_v, i_n, N, stride_vn, o_d, D, BLOCK_N, MASKED)
    b_grad_s = b_p * (scores(b_grad, b_v) - b_delta[:, None])
    if p_rstd_k is not None:
        b_grad_s *= (tl.load(p_rstd_k + o_n, mask=o_n < N, other=0.0) * inverse_unit)[None, :]
    return add_product(b_grad_q, b_grad_s, b_k)


@triton.jit
def grad_q_tile(
    p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_grad_out, p_lse, p_delta, p_grad_q, p_row_dot_q,
    p_partial,  # [D] of this tile
    i_m, m_end, i_h, N,
    peeled_keys,  # 1 where key 0 goes before the loop, else 0
    stride_qn, stride_kn, stride_vn, stride_gn, stride_dqn,
    scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_KEY: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr,
    MAY_LACK_KEYS: tl.constexpr,  # lse is -inf then
):  # fmt: skip
    """Queries i_m.. before m_end of one head; all pointers are that head's."""
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_m = o_m < m_end
    unit = 1.0
    if p_rstd_k is not None:
        b_q = load_rows(p_grad_q, i_m, m_end, stride_dqn, o_d, D, BLOCK_M, True)
        unit = tl.load(p_rstd_k)  # keeps dS * rstd_k in float16's range whatever k's size is
    else:
        b_q = load_rows(p_q, i_m, m_end, stride_qn, o_d, D, BLOCK_M, True)
    b_grad = load_rows(p_grad_out, i_m, m_end, stride_gn, o_d, D, BLOCK_M, True)
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf")) * LOG2E
    if MAY_LACK_KEYS:
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)

    b_grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2E
    if PEEL_KEY:
        b_grad_q = grad_q_step(
            b_grad_q, b_q, b_grad, b_lse, b_delta, p_k, p_v, p_rstd_k, 1.0 / unit, 0,
            peeled_keys if PACKED else N, stride_kn, stride_vn, o_d, scale_log2, D, 1, PACKED,
        )  # fmt: skip
    n_end = N
    if PACKED:
        p_k, p_v, N, n_end = keys_of_sequence(p_k, p_v, N, peeled_keys, stride_kn, stride_vn, BLOCK_N, TAIL)
        if p_rstd_k is not None:
            p_rstd_k += peeled_keys
    for i_n in range(0 if PACKED else peeled_keys, n_end, BLOCK_N):
        b_grad_q = grad_q_step(
            b_grad_q, b_q, b_grad, b_lse, b_delta, p_k, p_v, p_rstd_k, 1.0 / unit, i_n, N,
            stride_kn, stride_vn, o_d, scale_log2, D, BLOCK_N, TAIL,
        )  # fmt: skip
    if PACKED and not TAIL:  # noqa: SIM102 (resolved when compiled, the inner one at run time)
        if n_end < N:
            b_grad_q = grad_q_step(
                b_grad_q, b_q, b_grad, b_lse, b_delta, p_k, p_v, p_rstd_k, 1.0 / unit, n_end, N,
                stride_kn, stride_vn, o_d, scale_log2, D, BLOCK_N, LAST_AGAIN,
            )  # fmt: skip

    b_grad_q *= scale * unit
    if p_rstd_k is not None:
        b_raw = load_rows(p_q, i_m, m_end, stride_qn, o_d, D, BLOCK_M, True).to(tl.float32)
        b_grad_q *= tl.load(p_rstd_q + o_m, mask=m_m, other=0.0)[:, None]
        b_dot = b_grad_q * b_raw  # [BLOCK_M, BLOCK_D]
        tl.store(p_partial + o_d, tl.sum(b_dot, 0), mask=o_d < D)
        b_weight = load_head_weight(p_q_weight, i_h, o_d, D) * load_head_weight(p_k_weight, i_h, o_d, D)
        tl.store(p_row_dot_q + o_m, tl.sum(b_dot * b_weight[None, :], 1), mask=m_m)
        b_grad_q *= b_weight[None, :]
    store_rows(p_grad_q, i_m, m_end, stride_dqn, o_d, D, BLOCK_M, b_grad_q)


@triton.jit
def attention_grad_q_kernel(
    p_q, p_k, p_v,  # [B, N, H, D]
    p_q_weight, p_k_weight,  # [H * D] or None
    p_rstd_q, p_rstd_k,  # [B, N] or None
    p_grad_out,  # [B, N, H, D]
    p_lse, p_delta,  # [B, H, N]
    p_grad_q,  # [B, N, H, D], holds q~ before with QK-norm
    p_row_dot_q,  # [B, H, N] or None
    p_partials,  # [1, B * programs, H * D] float32 or None
    p_cu_seqlens,  # [B + 1] of a pack, else None
    p_cu_seqlens_k,  # where keys have their own, else None
    N, N_k,  # the latter None where keys are as many as queries
    H, programs,  # of one head
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_dqb, stride_dqn, stride_dqh,
    scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_QUERY: tl.constexpr,  # query 0 has a program of its own; in a pack where its sequence asks for it
    PEEL_KEY: tl.constexpr,  # key 0 goes before the loop; alike
    TAIL: tl.constexpr,  # the last tile of the loop is not whole
):  # fmt: skip
    PACKED: tl.constexpr = p_cu_seqlens is not None
    MAY_LACK_KEYS: tl.constexpr = p_cu_seqlens_k is not None
    i_tile, i_bh, i_b, i_h, i_lone, i_q, n_q, peeled_queries, i_k, n_k, peeled_keys = place_of_program(
        p_cu_seqlens, p_cu_seqlens_k, N, N_k, H, programs, BLOCK_M, BLOCK_N, PEEL_QUERY, PEEL_KEY
    )
    p_q, stride_qn = one_head(p_q, i_q, i_h, stride_qb, stride_qn, stride_qh, STRIDE_UNIT)
    p_k, stride_kn = one_head(p_k, i_k, i_h, stride_kb, stride_kn, stride_kh, STRIDE_UNIT)
    p_v, stride_vn = one_head(p_v, i_k, i_h, stride_vb, stride_vn, stride_vh, STRIDE_UNIT)
    p_grad_out, stride_gn = one_head(p_grad_out, i_q, i_h, stride_gb, stride_gn, stride_gh, STRIDE_UNIT)
    p_grad_q, stride_dqn = one_head(p_grad_q, i_q, i_h, stride_dqb, stride_dqn, stride_dqh, STRIDE_UNIT)
    i_row = first_row(i_bh, i_h, i_q, N, PACKED)
    p_lse += i_row
    p_delta += i_row
    if p_rstd_k is not None:
        i_token = first_token(i_b, i_q, N, PACKED)
        p_rstd_q += i_token
        p_rstd_k += i_token
        p_row_dot_q += i_row
        p_partials += ((i_b * programs + i_tile) * H + i_h) * D
    # fmt: off
    if PEEL_QUERY:
        if i_tile == i_lone:
            grad_q_tile(p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_grad_out, p_lse, p_delta, p_grad_q,
                        p_row_dot_q, p_partials, 0, 1, i_h, n_k, peeled_keys, stride_qn, stride_kn, stride_vn,
                        stride_gn, stride_dqn, scale,
                        D, BLOCK_D, LONE_ROWS, BLOCK_N, PEEL_KEY, TAIL, PACKED, MAY_LACK_KEYS)
        else:
            grad_q_tile(p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_grad_out, p_lse, p_delta, p_grad_q,
                        p_row_dot_q, p_partials, peeled_queries + i_tile * BLOCK_M, n_q, i_h, n_k, peeled_keys,
                        stride_qn, stride_kn, stride_vn, stride_gn, stride_dqn, scale,
                        D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_KEY, TAIL, PACKED, MAY_LACK_KEYS)
    else:
        grad_q_tile(p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_grad_out, p_lse, p_delta, p_grad_q,
                    p_row_dot_q, p_partials, i_tile * BLOCK_M, n_q, i_h, n_k, peeled_keys, stride_qn, stride_kn,
                    stride_vn, stride_gn, stride_dqn, scale,
                    D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_KEY, TAIL, PACKED, MAY_LACK_KEYS)
    # fmt: on


def grad_q(
    config: AttentionConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    norm: QKNorm,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_q: Tensor,
    scale: float,
    sequences: Sequences | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills grad_q, which holds q~ with QK-norm; returns row_dot_q [B, H, N] and partial sums of the weights' gradient
    [1, B * programs, H * D] with it."""
    B, N, H, D = q.shape
    row_dot_q = partials = None
    if norm.rstd_q is not None:
        row_dot_q = q.new_empty((B, H, N), dtype=torch.float32)
        programs = B * config.programs(N)
        if sequences is not None:
            programs = sequences.count * config.programs(sequences.max_seqlen)
        partials = q.new_empty((1, programs, H * D), dtype=torch.float32)
    pointers = (q, k, v, *norm, grad_out, lse, delta, grad_q, row_dot_q, partials)
    run_tiles(attention_grad_q_kernel, config, "queries", pointers, (q, k, v, grad_out, grad_q), scale, sequences)
    return row_dot_q, partials
