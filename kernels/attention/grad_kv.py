"""Attention's gradients of keys and values; a program keeps a tile of one head's keys and walks over its queries.

Formulas and the class token are explained in `backward.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.attention.config import AttentionConfig, Sequences, run_tiles
from internvit.kernels.attention.scores import LN2, LOG2E, add_product, probabilities, scores
from internvit.kernels.attention.tiles import (
    LONE_ROWS,
    first_row,
    first_token,
    load_rows,
    load_rows_or_last,
    one_head,
    place_of_program,
    store_rows,
)


@triton.jit
def load_queries(p_x, i_m, N, stride_n, o_d, D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr):
    """Rows i_m.. [BLOCK_M, BLOCK_D]; what stands beyond N is finite where x is: its probabilities are 0."""
    if MASKED:
        b_x = load_rows_or_last(p_x, i_m, N, stride_n, o_d, D, BLOCK_M)
    else:
        b_x = load_rows(p_x, i_m, N, stride_n, o_d, D, BLOCK_M, False)
    return b_x


@triton.jit
def grad_kv_step(
    b_grad_k,  # [BLOCK_N, BLOCK_D]
    b_grad_v,  # [BLOCK_N, BLOCK_D]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D]
    b_column_scale,  # [BLOCK_N]: rstd_k, or scale
    p_q, p_grad_out, p_lse, p_delta,
    i_m, N, stride_qn, stride_gn, o_d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,  # scores are those of QK-norm
):  # fmt: skip
    """One tile of queries into the gradients of a tile of keys and values; everything is transposed."""
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    b_q = load_queries(p_q, i_m, N, stride_qn, o_d, D, BLOCK_M, MASKED)
    b_s = scores(b_k, b_q)  # [BLOCK_N, BLOCK_M]
    b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=float("inf"))  # exp2(-inf) drops queries beyond N
    b_p = probabilities(b_s * b_column_scale[:, None] - (b_lse * LOG2E)[None, :], BOUNDED)
    b_grad = load_queries(p_grad_out, i_m, N, stride_gn, o_d, D, BLOCK_M, MASKED)
    b_grad_v = add_product(b_grad_v, b_p, b_grad)
    b_grad_p = scores(b_v, b_grad)
    b_delta = tl.load(p_delta + o_m, mask=o_m < N, other=0.0)
    b_grad_s = b_p * (b_grad_p - b_delta[None, :])
    b_grad_k = add_product(b_grad_k, b_grad_s, b_q)
    return b_grad_k, b_grad_v


@triton.jit
def grad_kv_tile(
    p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_rstd_k, p_grad_k, p_grad_v, p_row_dot_k,
    i_n, n_end, N,
    peeled_queries,  # 1 where query 0 goes before the loop, else 0
    stride_qn, stride_kn, stride_vn, stride_gn, stride_dkn, stride_dvn,
    scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_QUERY: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Keys and values i_n.. before n_end of one head; all pointers are that head's."""
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_k = load_rows(p_k, i_n, n_end, stride_kn, o_d, D, BLOCK_N, True)
    b_v = load_rows(p_v, i_n, n_end, stride_vn, o_d, D, BLOCK_N, True)
    if p_rstd_k is not None:
        b_column_scale = tl.load(p_rstd_k + o_n, mask=o_n < n_end, other=0.0)
    else:
        b_column_scale = tl.full([BLOCK_N], LOG2E, tl.float32) * scale

    b_grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if PEEL_QUERY:
        b_grad_k, b_grad_v = grad_kv_step(
            b_grad_k, b_grad_v, b_k, b_v, b_column_scale, p_q, p_grad_out, p_lse, p_delta, 0,
            peeled_queries if PACKED else N, stride_qn, stride_gn, o_d, D, 1, False, p_rstd_k is not None,
        )  # fmt: skip
    if PACKED:
        p_q += peeled_queries * stride_qn
        p_grad_out += peeled_queries * stride_gn
        p_lse += peeled_queries
        p_delta += peeled_queries
        N -= peeled_queries
    for i_m in range(0 if PACKED else peeled_queries, N, BLOCK_M):
        b_grad_k, b_grad_v = grad_kv_step(
            b_grad_k, b_grad_v, b_k, b_v, b_column_scale, p_q, p_grad_out, p_lse, p_delta, i_m, N,
            stride_qn, stride_gn, o_d, D, BLOCK_M, TAIL, p_rstd_k is not None,
        )  # fmt: skip
    # without QK-norm b_column_scale is scale * log2(e): times ln 2 it is the scale
    b_grad_k *= (b_column_scale * LN2)[:, None]
    store_rows(p_grad_k, i_n, n_end, stride_dkn, o_d, D, BLOCK_N, b_grad_k)
    store_rows(p_grad_v, i_n, n_end, stride_dvn, o_d, D, BLOCK_N, b_grad_v)
    if p_row_dot_k is not None:
        # read again: keys kept in registers over the loop spill 112 bytes at D = 128 on sm_100, and take 11 to 27 more
        b_k = load_rows(p_k, i_n, n_end, stride_kn, o_d, D, BLOCK_N, True)
        tl.store(p_row_dot_k + o_n, tl.sum(b_grad_k * b_k.to(tl.float32), 1), mask=o_n < n_end)


@triton.jit
def attention_grad_kv_kernel(
    p_q,  # [B, N, H, D]: q~ with QK-norm
    p_k, p_v, p_grad_out,  # [B, N, H, D]
    p_lse, p_delta,  # [B, H, N]
    p_rstd_k,  # [B, N] or None
    p_grad_k, p_grad_v,  # [B, N, H, D]
    p_row_dot_k,  # [B, H, N] or None
    p_cu_seqlens,  # [B + 1] of a pack, else None
    p_cu_seqlens_q,  # where queries have their own, else None
    N, N_q,  # keys; queries, None where they are as many
    H, programs,  # of one head
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    stride_gb, stride_gn, stride_gh,
    stride_dkb, stride_dkn, stride_dkh,
    stride_dvb, stride_dvn, stride_dvh,
    scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_QUERY: tl.constexpr,  # query 0 goes before the loop; in a pack where its sequence asks for it
    PEEL_KEY: tl.constexpr,  # key 0 has a program of its own; alike
    TAIL: tl.constexpr,  # the last tile of the loop is not whole
):  # fmt: skip
    PACKED: tl.constexpr = p_cu_seqlens is not None
    i_tile, i_bh, i_b, i_h, i_lone, i_k, n_k, peeled_keys, i_q, n_q, peeled_queries = place_of_program(
        p_cu_seqlens, p_cu_seqlens_q, N, N_q, H, programs, BLOCK_N, BLOCK_M, PEEL_KEY, PEEL_QUERY
    )
    p_q, stride_qn = one_head(p_q, i_q, i_h, stride_qb, stride_qn, stride_qh, STRIDE_UNIT)
    p_k, stride_kn = one_head(p_k, i_k, i_h, stride_kb, stride_kn, stride_kh, STRIDE_UNIT)
    p_v, stride_vn = one_head(p_v, i_k, i_h, stride_vb, stride_vn, stride_vh, STRIDE_UNIT)
    p_grad_out, stride_gn = one_head(p_grad_out, i_q, i_h, stride_gb, stride_gn, stride_gh, STRIDE_UNIT)
    p_grad_k, stride_dkn = one_head(p_grad_k, i_k, i_h, stride_dkb, stride_dkn, stride_dkh, STRIDE_UNIT)
    p_grad_v, stride_dvn = one_head(p_grad_v, i_k, i_h, stride_dvb, stride_dvn, stride_dvh, STRIDE_UNIT)
    i_row = first_row(i_bh, i_h, i_q, N if N_q is None else N_q, PACKED)
    p_lse += i_row
    p_delta += i_row
    if p_rstd_k is not None:
        p_rstd_k += first_token(i_b, i_k, N, PACKED)
        p_row_dot_k += i_row  # with QK-norm queries and keys are the same tokens
    # fmt: off
    if PEEL_KEY:
        if i_tile == i_lone:
            grad_kv_tile(p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_rstd_k, p_grad_k, p_grad_v, p_row_dot_k,
                         0, 1, n_q, peeled_queries, stride_qn, stride_kn, stride_vn, stride_gn, stride_dkn, stride_dvn,
                         scale, D, BLOCK_D, BLOCK_M, LONE_ROWS, PEEL_QUERY, TAIL, PACKED)
        else:
            grad_kv_tile(p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_rstd_k, p_grad_k, p_grad_v, p_row_dot_k,
                         peeled_keys + i_tile * BLOCK_N, n_k, n_q, peeled_queries, stride_qn, stride_kn, stride_vn,
                         stride_gn, stride_dkn, stride_dvn, scale,
                         D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_QUERY, TAIL, PACKED)
    else:
        grad_kv_tile(p_q, p_k, p_v, p_grad_out, p_lse, p_delta, p_rstd_k, p_grad_k, p_grad_v, p_row_dot_k,
                     i_tile * BLOCK_N, n_k, n_q, peeled_queries, stride_qn, stride_kn, stride_vn, stride_gn, stride_dkn,
                     stride_dvn, scale, D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_QUERY, TAIL, PACKED)
    # fmt: on


def grad_kv(
    config: AttentionConfig,
    queries: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    rstd_k: Tensor | None,
    grad_k: Tensor,
    grad_v: Tensor,
    scale: float,
    sequences: Sequences | None = None,
) -> Tensor | None:
    """Fills grad_k and grad_v; returns row_dot_k [B, H, N] with QK-norm, whose `queries` are q~."""
    B, N, H, _ = k.shape
    row_dot_k = None if rstd_k is None else k.new_empty((B, H, N), dtype=torch.float32)
    pointers = (queries, k, v, grad_out, lse, delta, rstd_k, grad_k, grad_v, row_dot_k)
    strided = (queries, k, v, grad_out, grad_k, grad_v)
    run_tiles(attention_grad_kv_kernel, config, "keys", pointers, strided, scale, sequences)
    return row_dot_k
