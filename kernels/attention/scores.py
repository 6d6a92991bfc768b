"""Scores of queries and keys in base 2, with QK-norm folded in, and the products around them."""

import triton
import triton.language as tl

from internvit.kernels.attention.tiles import load_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scores(b_a, b_b):
    """b_a b_b^T [M, N]; without matrix instructions where b_b is a single row."""
    if b_b.shape[0] == 1:
        b_s = tl.sum(b_a.to(tl.float32) * b_b.to(tl.float32), 1)[:, None]
    else:
        b_s = tl.dot(b_a, tl.trans(b_b), input_precision="ieee")
    return b_s


@triton.jit
def add_product(b_acc, b_p, b_x):
    """b_acc + b_p b_x [M, BLOCK_D], b_p rounded to b_x's dtype; no matrix instructions where b_x is a single row.

    In float32 each tile's product is summed by itself, then added: one chain of multiply-adds over all keys errs more
    with every token (4097: 1.2e-6 on CPUs, 3.8e-7 in blocks; docs/numerics.md). Triton makes `b_acc + dot(b_p, b_x)`
    the chain again but where `max_num_imprecise_acc`, which concerns float8 alone otherwise, says not to.
    """
    b_p = b_p.to(b_x.dtype)
    if b_p.shape[1] == 1:
        b_acc += b_p.to(tl.float32) * b_x.to(tl.float32)
    elif b_x.dtype == tl.float32:
        b_acc += tl.dot(b_p, b_x, input_precision="ieee", max_num_imprecise_acc=b_p.shape[1])
    else:
        b_acc = tl.dot(b_p, b_x, b_acc)
    return b_acc


@triton.jit
def fold(b_q, p_q_weight, p_k_weight, b_rstd, i_h, o_d, scale_log2, D: tl.constexpr):
    """The query tile with both weights, its own statistics and the scale: in float32, rounded once to its dtype."""
    b_weight = load_head_weight(p_q_weight, i_h, o_d, D) * load_head_weight(p_k_weight, i_h, o_d, D)  # [BLOCK_D]
    return (b_q.to(tl.float32) * (b_rstd * scale_log2)[:, None] * b_weight[None, :]).to(b_q.dtype)


@triton.jit
def load_head_weight(p_weight, i_h, o_d, D: tl.constexpr):
    return tl.load(p_weight + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def key_scores(
    b_q,  # [BLOCK_M, BLOCK_D]: q~ with QK-norm
    p_k, p_rstd_k,
    i_n, N, stride_kn, o_d, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys and its scores [BLOCK_M, BLOCK_N] in units of log2, -inf beyond the last key."""
    o_n = i_n + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    b_k = load_rows(p_k, i_n, N, stride_kn, o_d, D, BLOCK_N, MASKED)
    b_s = scores(b_q, b_k)
    if p_rstd_k is not None:
        b_s *= tl.load(p_rstd_k + o_n, mask=o_n < N, other=0.0)[None, :]
    else:
        b_s *= scale_log2
    if MASKED:
        b_s = tl.where((o_n < N)[None, :], b_s, float("-inf"))
    return b_k, b_s


@triton.jit
def probabilities(b_exponent, BOUNDED: tl.constexpr):
    """2^(S - lse). Plain scores have no bound: from 10^9 on, lse's float32 rounding alone is an exponent of 128 and the
    gradients would be infinite; with at most 0 a probability is at most 1. It costs 1 instruction a score in some 28
    (sm_90, D = 64); QK-norm's scores need none."""
    if not BOUNDED:
        b_exponent = tl.minimum(b_exponent, 0.0)
    return tl.exp2(b_exponent)
