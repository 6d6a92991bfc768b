"""Flash attention's backward on a GPU: two passes that recompute the scores, without atomics.

    P = exp(S - lse),  dV = P^T dO,  dS = P * (dO V^T - delta),  delta_i = sum_d dO_id O_id
    grad_q_i = scale * rstd_q[i] * q_weight * k_weight * sum_j dS_ij rstd_k[j] k_j   (scale alone without norm)
    grad_k_j = rstd_k[j] * ln 2 * sum_i dS_ij q~_i,  q~ the forward's folded queries (scale * q without norm)

The scores depend on the two weights through their product alone, so one sum over tokens serves both gradients:

    G_d = sum_i scale * rstd_q[i] * q_id * sum_j dS_ij rstd_k[j] k_jd
    grad_q_weight = k_weight * G,  grad_k_weight = q_weight * G

and QK-norm's own backward needs row_dot_q[i] = sum_d grad_q_id q_id of each head, and the same of k. A first pass
writes delta and, with QK-norm, q~ into grad_q's memory, which the last pass replaces: no buffer of its own, and the
scores here have the forward's bits, so that the probabilities sum to one even where softmax is a spike.

The class token is not peeled here as in the forward. At 1025 tokens a head takes 17 x 17 tile products of 64 x 64
(sm_80 and sm_90 at D = 128) where 16 x 16 would do, 11 % fewer, and 9 x 17 of 128 x 64 where 8 x 16 would, 16 % fewer,
in each of the seven products of both kernels. Against it stand rank-one updates around each loop, at 180 to 255
registers, and one more program a head in each kernel for the token's own row: not compiled yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels import launch
from internvit.kernels.attention_launch import attention_launch
from internvit.kernels.attention_tiles import (
    LN2,
    LOG2E,
    fold,
    load_head_weight,
    load_rows,
    scaled_scores,
    store_rows,
)
from internvit.kernels.layer_scale_residual import contiguous
from internvit.kernels.qk_norm_stats import dense_heads, token_strides
from internvit.kernels.rows import sum_partials
from internvit.ops.registration import empty_grad


@triton.jit
def attention_delta_kernel(
    p_grad_out,  # [B, N, H, D]
    p_out,  # [B, N, H, D]
    p_q,  # [B, N, H, D]
    p_q_weight,  # [H * D] or None
    p_k_weight,  # [H * D] or None
    p_rstd_q,  # [B, N] or None
    p_delta,  # [B, H, N]
    p_folded,  # [B, N, H, D], grad_q's memory
    N,
    H,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_ob,
    stride_on,
    stride_oh,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_fb,
    stride_fn,
    stride_fh,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_M)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_m = tl.program_id(0) % tiles * BLOCK_M
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_grad = load_rows(p_grad_out + i_b * stride_gb + i_h * stride_gh, i_m, N, stride_gn, o_d, D, BLOCK_M, True)
    b_out = load_rows(p_out + i_b * stride_ob + i_h * stride_oh, i_m, N, stride_on, o_d, D, BLOCK_M, True)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + i_bh * N + o_m, b_delta, mask=o_m < N)
    if p_rstd_q is not None:
        b_q = load_rows(p_q + i_b * stride_qb + i_h * stride_qh, i_m, N, stride_qn, o_d, D, BLOCK_M, True)
        b_rstd = tl.load(p_rstd_q + i_b * N + o_m, mask=o_m < N, other=0.0)
        b_folded = fold(b_q, p_q_weight, p_k_weight, b_rstd, i_h, o_d, scale_log2, D)
        store_rows(p_folded + i_b * stride_fb + i_h * stride_fh, i_m, N, stride_fn, o_d, D, BLOCK_M, b_folded)


@triton.jit
def probabilities(b_exponent, BOUNDED: tl.constexpr):
    """2^(S - lse). Plain scores have no bound: from 10^9 on, lse's float32 rounding alone is an exponent of 128 and the
    gradients would be infinite; with at most 0 a probability is at most 1. It costs 1 instruction a score in some 28
    (sm_90, D = 64); QK-norm's scores need none."""
    if BOUNDED:
        return tl.exp2(b_exponent)
    return tl.exp2(tl.minimum(b_exponent, 0.0))


@triton.jit
def grad_kv_step(
    b_grad_k,  # [BLOCK_N, BLOCK_D]
    b_grad_v,  # [BLOCK_N, BLOCK_D]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D]
    b_column_scale,  # [BLOCK_N]: rstd_k, or scale
    p_q,
    p_grad_out,
    p_lse,
    p_delta,
    i_m,
    N,
    stride_qn,
    stride_gn,
    o_d,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
    BOUNDED: tl.constexpr,  # scores are those of QK-norm
):
    """One tile of queries into the gradients of a tile of keys and values; everything is transposed."""
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    b_q = load_rows(p_q, i_m, N, stride_qn, o_d, D, BLOCK_M, MASKED)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    b_lse = tl.load(p_lse + o_m, mask=o_m < N, other=float("inf"))  # exp2(-inf) drops queries beyond N
    b_p = probabilities(b_s * b_column_scale[:, None] - (b_lse * LOG2E)[None, :], BOUNDED)
    b_grad = load_rows(p_grad_out, i_m, N, stride_gn, o_d, D, BLOCK_M, MASKED)
    b_grad_v = tl.dot(b_p.to(b_grad.dtype), b_grad, b_grad_v, input_precision="ieee")
    b_grad_p = tl.dot(b_v, tl.trans(b_grad), input_precision="ieee")
    b_delta = tl.load(p_delta + o_m, mask=o_m < N, other=0.0)
    b_grad_s = b_p * (b_grad_p - b_delta[None, :])
    b_grad_k = tl.dot(b_grad_s.to(b_q.dtype), b_q, b_grad_k, input_precision="ieee")
    return b_grad_k, b_grad_v


@triton.jit
def attention_grad_kv_kernel(
    p_q,  # [B, N, H, D]: q~ with QK-norm
    p_k,  # [B, N, H, D]
    p_v,  # [B, N, H, D]
    p_grad_out,  # [B, N, H, D]
    p_lse,  # [B, H, N]
    p_delta,  # [B, H, N]
    p_rstd_k,  # [B, N] or None
    p_grad_k,  # [B, N, H, D]
    p_grad_v,  # [B, N, H, D]
    p_row_dot_k,  # [B, H, N] or None
    N,
    H,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_dkb,
    stride_dkn,
    stride_dkh,
    stride_dvb,
    stride_dvn,
    stride_dvh,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # the last tile of the loop is not whole
):
    tiles = tl.cdiv(N, BLOCK_N)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_grad_out += i_b * stride_gb + i_h * stride_gh
    p_lse += i_bh * N
    p_delta += i_bh * N
    i_n = tl.program_id(0) % tiles * BLOCK_N
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    b_k = load_rows(p_k + i_b * stride_kb + i_h * stride_kh, i_n, N, stride_kn, o_d, D, BLOCK_N, True)
    b_v = load_rows(p_v + i_b * stride_vb + i_h * stride_vh, i_n, N, stride_vn, o_d, D, BLOCK_N, True)
    if p_rstd_k is not None:
        b_column_scale = tl.load(p_rstd_k + i_b * N + o_n, mask=o_n < N, other=0.0)
    else:
        b_column_scale = tl.full([BLOCK_N], LOG2E, tl.float32) * scale

    b_grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i_m in range(0, N, BLOCK_M):
        b_grad_k, b_grad_v = grad_kv_step(
            b_grad_k, b_grad_v, b_k, b_v, b_column_scale, p_q, p_grad_out, p_lse, p_delta, i_m, N,
            stride_qn, stride_gn, o_d, D, BLOCK_M, TAIL, p_rstd_k is not None,
        )  # fmt: skip
    # without QK-norm b_column_scale is scale * log2(e): times ln 2 it is the scale
    b_grad_k *= (b_column_scale * LN2)[:, None]
    store_rows(p_grad_k + i_b * stride_dkb + i_h * stride_dkh, i_n, N, stride_dkn, o_d, D, BLOCK_N, b_grad_k)
    store_rows(p_grad_v + i_b * stride_dvb + i_h * stride_dvh, i_n, N, stride_dvn, o_d, D, BLOCK_N, b_grad_v)
    if p_row_dot_k is not None:
        tl.store(p_row_dot_k + i_bh * N + o_n, tl.sum(b_grad_k * b_k.to(tl.float32), 1), mask=o_n < N)


@triton.jit
def grad_q_step(
    b_grad_q,  # [BLOCK_M, BLOCK_D]
    b_q,  # [BLOCK_M, BLOCK_D]
    b_grad,  # [BLOCK_M, BLOCK_D]
    b_lse,  # [BLOCK_M], in units of log2
    b_delta,  # [BLOCK_M]
    p_k,
    p_v,
    p_rstd_k,
    inverse_unit,
    i_n,
    N,
    stride_kn,
    stride_vn,
    o_d,
    scale_log2,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile of keys and values into the gradient of a tile of queries."""
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b_k = load_rows(p_k, i_n, N, stride_kn, o_d, D, BLOCK_N, MASKED)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_s = scaled_scores(b_s, p_rstd_k, o_n, N, scale_log2, MASKED)
    b_p = probabilities(b_s - b_lse[:, None], p_rstd_k is not None)
    b_v = load_rows(p_v, i_n, N, stride_vn, o_d, D, BLOCK_N, MASKED)
    b_grad_s = b_p * (tl.dot(b_grad, tl.trans(b_v), input_precision="ieee") - b_delta[:, None])
    if p_rstd_k is not None:
        b_grad_s *= (tl.load(p_rstd_k + o_n, mask=o_n < N, other=0.0) * inverse_unit)[None, :]
    return tl.dot(b_grad_s.to(b_k.dtype), b_k, b_grad_q, input_precision="ieee")


@triton.jit
def attention_grad_q_kernel(
    p_q,  # [B, N, H, D]
    p_k,  # [B, N, H, D]
    p_v,  # [B, N, H, D]
    p_q_weight,  # [H * D] or None
    p_k_weight,  # [H * D] or None
    p_rstd_q,  # [B, N] or None
    p_rstd_k,  # [B, N] or None
    p_grad_out,  # [B, N, H, D]
    p_lse,  # [B, H, N]
    p_delta,  # [B, H, N]
    p_grad_q,  # [B, N, H, D], holds q~ before with QK-norm
    p_row_dot_q,  # [B, H, N] or None
    p_partials,  # [1, B * tiles, H * D] float32 or None
    N,
    H,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_gb,
    stride_gn,
    stride_gh,
    stride_dqb,
    stride_dqn,
    stride_dqh,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,  # the last tile of the loop is not whole
):
    tiles = tl.cdiv(N, BLOCK_M)
    i_m = tl.program_id(0) % tiles * BLOCK_M
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    p_q += i_b * stride_qb + i_h * stride_qh
    p_k += i_b * stride_kb + i_h * stride_kh
    p_v += i_b * stride_vb + i_h * stride_vh
    p_grad_q += i_b * stride_dqb + i_h * stride_dqh
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    m_m = o_m < N
    unit = 1.0
    if p_rstd_k is not None:
        b_q = load_rows(p_grad_q, i_m, N, stride_dqn, o_d, D, BLOCK_M, True)
        p_rstd_k += i_b * N
        unit = tl.load(p_rstd_k)  # keeps dS * rstd_k in float16's range whatever k's size is
    else:
        b_q = load_rows(p_q, i_m, N, stride_qn, o_d, D, BLOCK_M, True)
    b_grad = load_rows(p_grad_out + i_b * stride_gb + i_h * stride_gh, i_m, N, stride_gn, o_d, D, BLOCK_M, True)
    b_lse = tl.load(p_lse + i_bh * N + o_m, mask=m_m, other=float("inf")) * LOG2E
    b_delta = tl.load(p_delta + i_bh * N + o_m, mask=m_m, other=0.0)

    b_grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2E
    for i_n in range(0, N, BLOCK_N):
        b_grad_q = grad_q_step(
            b_grad_q, b_q, b_grad, b_lse, b_delta, p_k, p_v, p_rstd_k, 1.0 / unit, i_n, N,
            stride_kn, stride_vn, o_d, scale_log2, D, BLOCK_N, TAIL,
        )  # fmt: skip

    b_grad_q *= scale * unit
    if p_rstd_k is not None:
        b_raw = load_rows(p_q, i_m, N, stride_qn, o_d, D, BLOCK_M, True).to(tl.float32)
        b_grad_q *= tl.load(p_rstd_q + i_b * N + o_m, mask=m_m, other=0.0)[:, None]
        b_dot = b_grad_q * b_raw  # [BLOCK_M, BLOCK_D]
        o_partial = (i_b * tiles + i_m // BLOCK_M) * H * D + i_h * D
        tl.store(p_partials + o_partial + o_d, tl.sum(b_dot, 0), mask=o_d < D)
        b_weight = load_head_weight(p_q_weight, i_h, o_d, D) * load_head_weight(p_k_weight, i_h, o_d, D)
        tl.store(p_row_dot_q + i_bh * N + o_m, tl.sum(b_dot * b_weight[None, :], 1), mask=m_m)
        b_grad_q *= b_weight[None, :]
    store_rows(p_grad_q, i_m, N, stride_dqn, o_d, D, BLOCK_M, b_grad_q)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fills grad_q, grad_k and grad_v by their strides; returns the weights' gradients and the row dots."""
    grad_out, q, k, v, out = (dense_heads(t) for t in (grad_out, q, k, v, out))
    lse = lse.contiguous()
    q_weight, k_weight, rstd_q, rstd_k = (contiguous(t) for t in (q_weight, k_weight, rstd_q, rstd_k))
    B, N, H, D = q.shape
    target = launch.target_of(q)
    folded = rstd_k is not None
    blocks = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    delta = q.new_empty((B, H, N), dtype=torch.float32)
    choice = attention_launch("delta", D, q.dtype, target)
    launch.run(
        attention_delta_kernel,
        (triton.cdiv(N, choice.rows) * B * H,),
        *(grad_out, out, q, q_weight, k_weight, rstd_q, delta, grad_q, N, H),
        *(
            *token_strides(grad_out),
            *token_strides(out),
            *token_strides(q),
            *token_strides(grad_q),
            scale * LOG2E.value,
        ),
        **blocks,
        BLOCK_M=choice.rows,
        num_warps=choice.warps,
        num_stages=choice.stages,
    )
    row_dots = [q.new_empty((B, H, N), dtype=torch.float32) if folded else None for _ in range(2)]
    choice = attention_launch("grad_kv", D, q.dtype, target)
    queries = grad_q if folded else q
    launch.run(
        attention_grad_kv_kernel,
        (triton.cdiv(N, choice.rows) * B * H,),
        *(queries, k, v, grad_out, lse, delta, rstd_k, grad_k, grad_v, row_dots[1], N, H),
        *(*token_strides(queries), *token_strides(k), *token_strides(v), *token_strides(grad_out)),
        *(*token_strides(grad_k), *token_strides(grad_v), scale),
        **blocks,
        BLOCK_M=choice.columns,
        BLOCK_N=choice.rows,
        TAIL=N % choice.columns != 0,
        num_warps=choice.warps,
        num_stages=choice.stages,
    )
    choice = attention_launch("grad_q", D, q.dtype, target)
    tiles = triton.cdiv(N, choice.rows)
    partials = q.new_empty((1, B * tiles, H * D), dtype=torch.float32) if folded else None
    launch.run(
        attention_grad_q_kernel,
        (tiles * B * H,),
        *(q, k, v, q_weight, k_weight, rstd_q, rstd_k, grad_out, lse, delta, grad_q, row_dots[0], partials, N, H),
        *(*token_strides(q), *token_strides(k), *token_strides(v), *token_strides(grad_out), *token_strides(grad_q)),
        scale,
        **blocks,
        BLOCK_M=choice.rows,
        BLOCK_N=choice.columns,
        TAIL=N % choice.columns != 0,
        num_warps=choice.warps,
        num_stages=choice.stages,
    )
    if q_weight is None or k_weight is None or partials is None:
        return empty_grad(q), empty_grad(q), empty_grad(q), empty_grad(q)
    (shared,) = sum_partials(partials, q_weight.to(torch.float32))
    grad_q_weight = (shared * k_weight).to(q_weight.dtype)
    grad_k_weight = (shared * q_weight).to(k_weight.dtype)
    row_dot_q, row_dot_k = row_dots
    assert row_dot_q is not None
    assert row_dot_k is not None
    return grad_q_weight, grad_k_weight, row_dot_q, row_dot_k
