"""Sums over the columns of attention: how much each token is attended to, without the score matrix and without atomics.

    sums_j = sum_i 2^(S_ij - lse_i * log2(e)),  S in units of log2, as in `scores.py`

A program keeps a tile of one head's keys and walks over its queries, as `grad_kv` does; the scores have the forward's
bits. With QK-norm each tile of queries is folded again: a pass that writes q~ for all programs would be faster where a
head has many tiles of keys, and needs memory of q's size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.attention.config import AttentionConfig, QKNorm, Sequences, call, run_tiles
from internvit.kernels.attention.grad_kv import load_queries
from internvit.kernels.attention.scores import LOG2E, fold, scores
from internvit.kernels.attention.tiles import LONE_ROWS, first_row, first_token, load_rows, one_head, place_of_program
from internvit.kernels.common.heads import dense_heads


@triton.jit
def column_sums_step(
    b_sums,  # [BLOCK_N]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_column_scale,  # [BLOCK_N]: rstd_k, or scale * log2(e)
    p_q, p_q_weight, p_k_weight, p_rstd_q, p_lse,
    i_m, N, stride_qn, i_h, o_d, scale_log2,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of queries into the sums of a tile of keys; everything is transposed."""
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    b_q = load_queries(p_q, i_m, N, stride_qn, o_d, D, BLOCK_M, MASKED)
    if p_rstd_q is not None:
        b_rstd = tl.load(p_rstd_q + o_m, mask=o_m < N, other=0.0)
        b_q = fold(b_q, p_q_weight, p_k_weight, b_rstd, i_h, o_d, scale_log2, D)
    b_s = scores(b_k, b_q)  # [BLOCK_N, BLOCK_M]
    b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=float("inf"))  # exp2(-inf) drops queries beyond N
    b_exponent = b_s * b_column_scale[:, None] - (b_lse * LOG2E)[None, :]
    if p_rstd_q is None:  # plain scores have no bound, nor has lse's rounding; NaN stays
        b_exponent = tl.minimum(b_exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return b_sums + tl.sum(tl.exp2(b_exponent), 1)


@triton.jit
def column_sums_tile(
    p_q, p_k, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_lse, p_sums,
    i_n, n_end, N, i_h,
    peeled_queries,  # 1 where query 0 goes before the loop, else 0
    stride_qn, stride_kn, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_QUERY: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The sums of keys i_n.. before n_end of one head; all pointers are that head's."""
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_k = load_rows(p_k, i_n, n_end, stride_kn, o_d, D, BLOCK_N, True)
    if p_rstd_k is not None:
        b_column_scale = tl.load(p_rstd_k + o_n, mask=o_n < n_end, other=0.0)
    else:
        b_column_scale = tl.full([BLOCK_N], 1.0, tl.float32) * scale_log2
    b_sums = tl.zeros([BLOCK_N], tl.float32)
    if PEEL_QUERY:
        b_sums = column_sums_step(
            b_sums, b_k, b_column_scale, p_q, p_q_weight, p_k_weight, p_rstd_q, p_lse, 0,
            peeled_queries if PACKED else N, stride_qn, i_h, o_d, scale_log2, D, 1, False,
        )  # fmt: skip
    if PACKED:
        p_q += peeled_queries * stride_qn
        p_lse += peeled_queries
        if p_rstd_q is not None:
            p_rstd_q += peeled_queries
        N -= peeled_queries
    for i_m in range(0 if PACKED else peeled_queries, N, BLOCK_M):
        b_sums = column_sums_step(
            b_sums, b_k, b_column_scale, p_q, p_q_weight, p_k_weight, p_rstd_q, p_lse, i_m, N,
            stride_qn, i_h, o_d, scale_log2, D, BLOCK_M, TAIL,
        )  # fmt: skip
    tl.store(p_sums + o_n, b_sums, mask=o_n < n_end)


@triton.jit
def attention_column_sums_kernel(
    p_q, p_k,  # [B, N, H, D]
    p_q_weight, p_k_weight,  # [H * D] or None
    p_rstd_q, p_rstd_k,  # [B, N] or None
    p_lse,  # [B, H, N]
    p_sums,  # [B, H, N]
    p_cu_seqlens,  # [B + 1] of a pack, else None
    p_cu_seqlens_q,  # None, as N_q: queries are the keys' tokens
    N, N_q, H, programs,  # of one head
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_QUERY: tl.constexpr,  # query 0 goes before the loop; in a pack where its sequence asks for it
    PEEL_KEY: tl.constexpr,  # key 0 has a program of its own; alike
    TAIL: tl.constexpr,  # the last tile of the loop is not whole
):  # fmt: skip
    PACKED: tl.constexpr = p_cu_seqlens is not None
    i_tile, i_bh, i_b, i_h, i_lone, i_image, n_k, peeled_keys, _, _, peeled_queries = place_of_program(
        p_cu_seqlens, p_cu_seqlens_q, N, N_q, H, programs, BLOCK_N, BLOCK_M, PEEL_KEY, PEEL_QUERY
    )
    p_q, stride_qn = one_head(p_q, i_image, i_h, stride_qb, stride_qn, stride_qh, STRIDE_UNIT)
    p_k, stride_kn = one_head(p_k, i_image, i_h, stride_kb, stride_kn, stride_kh, STRIDE_UNIT)
    i_row = first_row(i_bh, i_h, i_image, N, PACKED)
    p_lse += i_row
    p_sums += i_row
    if p_rstd_k is not None:
        i_token = first_token(i_b, i_image, N, PACKED)
        p_rstd_q += i_token
        p_rstd_k += i_token
    # fmt: off
    if PEEL_KEY:
        if i_tile == i_lone:
            column_sums_tile(p_q, p_k, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_lse, p_sums, 0, 1, n_k, i_h,
                             peeled_queries, stride_qn, stride_kn, scale_log2,
                             D, BLOCK_D, BLOCK_M, LONE_ROWS, PEEL_QUERY, TAIL, PACKED)
        else:
            column_sums_tile(p_q, p_k, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_lse, p_sums,
                             peeled_keys + i_tile * BLOCK_N, n_k, n_k, i_h, peeled_queries, stride_qn, stride_kn,
                             scale_log2, D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_QUERY, TAIL, PACKED)
    else:
        column_sums_tile(p_q, p_k, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_lse, p_sums,
                         i_tile * BLOCK_N, n_k, n_k, i_h, peeled_queries, stride_qn, stride_kn, scale_log2,
                         D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_QUERY, TAIL, PACKED)
    # fmt: on


def column_sums(
    config: AttentionConfig,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    norm: QKNorm,
    sequences: Sequences | None = None,
) -> Tensor:
    B, N, H, _ = q.shape
    sums = q.new_empty((B, H, N), dtype=torch.float32)
    pointers = (q, k, *norm, lse, sums)
    run_tiles(attention_column_sums_kernel, config, "keys", pointers, (q, k), scale * LOG2E.value, sequences)
    return sums


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:
    """The sums [B, H, N] of float32; of a pack [total, H, D] with lse [H, total] the sums are [H, total]."""
    norm = QKNorm(q_weight, k_weight, rstd_q, rstd_k).contiguous()
    sequences = None if cu_seqlens is None else Sequences(cu_seqlens.contiguous(), max_seqlen)
    if sequences is not None:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    given = dense_heads(q), dense_heads(k), lse.contiguous(), scale, norm, sequences
    sums: Tensor = call("column_sums", q, column_sums, *given)
    return sums if sequences is None else sums.squeeze(0)
