"""Flash attention on a GPU, with QK-norm inside.

    s_ij = q_hat_i k_hat_j * scale,  out_i = sum_j softmax_j(s_ij) v_j,  lse_i = log sum_j exp(s_ij)
    q_hat = q * rstd_q * q_weight,  k_hat = k * rstd_k * k_weight,  or q and k themselves

q, k, v [B, N, H, D] by strides. The norm never touches K in memory: the query tile is taken times
rstd_q * q_weight * k_weight * scale * log2(e) once, rounded to its dtype, and column j of the scores times rstd_k[j].
One program keeps a tile of one head's queries and walks over its keys; softmax runs in base 2 and float32.

The class token makes 1025 = 8 * 128 + 1 of 1024 patches: a ninth tile of queries and a 17th of keys with one row each.
Where N is one more than whole tiles the first key starts the softmax instead, and the first query gets a program of 16
rows, 15 of them masked: 128 tile products a head and 16 of an eighth instead of 153, and none of them masked.

With cu_seqlens q, k, v are packs [total, H, D], lse [H, total] as flash-attn's. The same kernel takes each sequence by
its own length: it finds at run time whether whole tiles leave the first token over, so that a sequence has the sums,
in their order, that it has alone and dense. A program beyond its sequence's end has nothing to do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.attention.config import AttentionConfig, QKNorm, Sequences, call, run_tiles
from internvit.kernels.attention.scores import LN2, LOG2E, add_product, fold, key_scores, scores
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
from internvit.kernels.common.heads import dense_heads
from internvit.kernels.common.rows import contiguous_like, load_vector


@triton.jit
def softmax_step(
    b_acc,  # [BLOCK_M, BLOCK_D]
    b_sum,  # [BLOCK_M]
    b_max,  # [BLOCK_M]
    b_q,  # [BLOCK_M, BLOCK_D]
    p_k, p_v, p_rstd_k,
    i_n, N, stride_kn, stride_vn, o_d, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into the running softmax."""
    if p_rstd_k is not None:
        _, b_s = key_scores(b_q, p_k, p_rstd_k, i_n, N, stride_kn, o_d, scale_log2, D, BLOCK_N, MASKED)
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new_max[:, None])
    else:
        # scale_log2 >= 0 scales the maximum of the raw scores: scale and maximum are one multiply-add a score
        b_s = scores(b_q, load_rows(p_k, i_n, N, stride_kn, o_d, D, BLOCK_N, MASKED))
        m_n = (i_n + tl.arange(0, BLOCK_N) < N)[None, :]
        b_tile_max = tl.max(tl.where(m_n, b_s, float("-inf")) if MASKED else b_s, 1)
        b_new_max = tl.maximum(b_max, b_tile_max * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new_max[:, None])
        if MASKED:
            b_p = tl.where(m_n, b_p, 0.0)
    b_correction = tl.exp2(b_max - b_new_max)
    b_sum = b_sum * b_correction + tl.sum(b_p, 1)
    b_v = load_rows(p_v, i_n, N, stride_vn, o_d, D, BLOCK_N, MASKED)
    b_p = b_p.to(b_v.dtype)
    b_acc = add_product(b_acc * b_correction[:, None], b_p, b_v)
    return b_acc, b_sum, b_new_max


@triton.jit
def attend_tile(
    p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_out, p_lse,
    i_m, m_end, i_h, N, H,
    peeled_keys,  # 1 where key 0 starts the softmax, else 0
    stride_qn, stride_kn, stride_vn,
    scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_KEY: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr,
    MAY_LACK_KEYS: tl.constexpr,  # then out is 0 and lse -inf
):  # fmt: skip
    """Queries i_m.. before m_end of one head; all pointers are that head's."""
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_q = load_rows(p_q, i_m, m_end, stride_qn, o_d, D, BLOCK_M, True)
    if p_rstd_k is not None:
        b_rstd = tl.load(p_rstd_q + o_m, mask=o_m < m_end, other=0.0)
        b_q = fold(b_q, p_q_weight, p_k_weight, b_rstd, i_h, o_d, scale_log2, D)
    if PEEL_KEY:
        b_first = tl.sum(b_q.to(tl.float32) * load_vector(p_k, o_d, D * peeled_keys)[None, :], 1)  # [BLOCK_M]
        b_max = b_first * (scale_log2 if p_rstd_k is None else tl.load(p_rstd_k))
        b_sum = tl.full([BLOCK_M], 1.0, tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + load_vector(p_v, o_d, D * peeled_keys)[None, :]
        if PACKED:
            b_max = tl.where(peeled_keys == 1, b_max, float("-inf"))
            b_sum *= peeled_keys
    else:
        b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        b_sum = tl.zeros([BLOCK_M], tl.float32)
        b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n_end = N
    if PACKED:
        p_k, p_v, N, n_end = keys_of_sequence(p_k, p_v, N, peeled_keys, stride_kn, stride_vn, BLOCK_N, TAIL)
        if p_rstd_k is not None:
            p_rstd_k += peeled_keys
    for i_n in range(0 if PACKED else peeled_keys, n_end, BLOCK_N):
        b_acc, b_sum, b_max = softmax_step(
            b_acc, b_sum, b_max, b_q, p_k, p_v, p_rstd_k, i_n, N, stride_kn, stride_vn, o_d, scale_log2,
            D, BLOCK_N, TAIL,
        )  # fmt: skip
    if PACKED and not TAIL:  # noqa: SIM102 (resolved when compiled, the inner one at run time)
        if n_end < N:
            b_acc, b_sum, b_max = softmax_step(
                b_acc, b_sum, b_max, b_q, p_k, p_v, p_rstd_k, n_end, N, stride_kn, stride_vn, o_d, scale_log2,
                D, BLOCK_N, LAST_AGAIN,
            )  # fmt: skip
    b_divisor = b_sum
    if MAY_LACK_KEYS:
        b_divisor = tl.where(b_sum == 0, 1.0, b_sum)
    store_rows(p_out, i_m, m_end, H * D, o_d, D, BLOCK_M, b_acc / b_divisor[:, None])
    tl.store(p_lse + o_m, (b_max + tl.log2(b_sum)) * LN2, mask=o_m < m_end)


@triton.jit
def attention_kernel(
    p_q, p_k, p_v,  # [B, N, H, D]
    p_q_weight, p_k_weight,  # [H * D] or None
    p_rstd_q, p_rstd_k,  # [B, N] or None
    p_out,  # [B, N, H, D] contiguous
    p_lse,  # [B, H, N]
    p_cu_seqlens,  # [B + 1] of a pack, else None
    p_cu_seqlens_k,  # where keys have their own, else None
    N, N_k,  # the latter None where keys are as many as queries
    H, programs,  # of one head
    stride_qb, stride_qn, stride_qh,
    stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PEEL_QUERY: tl.constexpr,  # query 0 has a program of its own; in a pack where its sequence asks for it
    PEEL_KEY: tl.constexpr,  # key 0 starts the softmax; alike
    TAIL: tl.constexpr,  # the last tile of keys is not whole
):  # fmt: skip
    PACKED: tl.constexpr = p_cu_seqlens is not None
    MAY_LACK_KEYS: tl.constexpr = p_cu_seqlens_k is not None
    i_tile, i_bh, i_b, i_h, i_lone, i_q, n_q, peeled_queries, i_k, n_k, peeled_keys = place_of_program(
        p_cu_seqlens, p_cu_seqlens_k, N, N_k, H, programs, BLOCK_M, BLOCK_N, PEEL_QUERY, PEEL_KEY
    )
    p_q, stride_qn = one_head(p_q, i_q, i_h, stride_qb, stride_qn, stride_qh, STRIDE_UNIT)
    p_k, stride_kn = one_head(p_k, i_k, i_h, stride_kb, stride_kn, stride_kh, STRIDE_UNIT)
    p_v, stride_vn = one_head(p_v, i_k, i_h, stride_vb, stride_vn, stride_vh, STRIDE_UNIT)
    i_token = first_token(i_b, i_q, N, PACKED)
    p_out += (i_token * H + i_h) * D
    p_lse += first_row(i_bh, i_h, i_q, N, PACKED)
    if p_rstd_k is not None:
        p_rstd_q += i_token
        p_rstd_k += i_token
    # fmt: off
    if PEEL_QUERY:
        if i_tile == i_lone:
            attend_tile(p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_out, p_lse,
                        0, 1, i_h, n_k, H, peeled_keys, stride_qn, stride_kn, stride_vn, scale_log2,
                        D, BLOCK_D, LONE_ROWS, BLOCK_N, PEEL_KEY, TAIL, PACKED, MAY_LACK_KEYS)
        else:
            attend_tile(p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_out, p_lse,
                        peeled_queries + i_tile * BLOCK_M, n_q, i_h, n_k, H, peeled_keys, stride_qn, stride_kn,
                        stride_vn, scale_log2, D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_KEY, TAIL, PACKED, MAY_LACK_KEYS)
    else:
        attend_tile(p_q, p_k, p_v, p_q_weight, p_k_weight, p_rstd_q, p_rstd_k, p_out, p_lse,
                    i_tile * BLOCK_M, n_q, i_h, n_k, H, peeled_keys, stride_qn, stride_kn, stride_vn, scale_log2,
                    D, BLOCK_D, BLOCK_M, BLOCK_N, PEEL_KEY, TAIL, PACKED, MAY_LACK_KEYS)
    # fmt: on


def attend(
    config: AttentionConfig,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    norm: QKNorm,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    B, N, H, _ = q.shape
    out = contiguous_like(q)
    lse = q.new_empty((B, H, N), dtype=torch.float32)
    if k.numel() == 0:
        return out.zero_(), lse.fill_(-float("inf"))
    pointers = (q, k, v, *norm, out, lse)
    run_tiles(attention_kernel, config, "queries", pointers, (q, k, v), scale * LOG2E.value, sequences)
    return out, lse


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse [B, H, N]; of a pack [total, H, D] with rstd [total], lse [H, total]; cu_seqlens_k as in
    `Sequences`. Without keys out is 0 and lse -inf.
    """
    norm = QKNorm(q_weight, k_weight, rstd_q, rstd_k).contiguous()
    if scale < 0:
        q, scale = -q, -scale
    if cu_seqlens is None:
        return call("forward", q, attend, *map(dense_heads, (q, k, v)), scale, norm)
    heads = (dense_heads(t.unsqueeze(0)) for t in (q, k, v))
    pack = Sequences(cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k).contiguous()
    out, lse = call("forward", q, attend, *heads, scale, norm, pack)
    return out.squeeze(0), lse.squeeze(0)
