"""Tiles of one head's rows, and how QK-norm folds into the scores: what attention's kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def row_pointers(p_x, i_first, stride_n, o_d, ROWS: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] from row i_first on. Offsets between tiles are int64; inside a tile they are int32 and
    the same for every tile, so that a loop carries one scalar and not a tile of 64-bit addresses."""
    o_tile = tl.arange(0, ROWS)[:, None] * stride_n + o_d[None, :]
    return p_x + tl.cast(i_first, tl.int64) * stride_n + o_tile


@triton.jit
def row_mask(i_first, N, o_d, D: tl.constexpr, ROWS: tl.constexpr):
    return (i_first + tl.arange(0, ROWS) < N)[:, None] & (o_d < D)[None, :]


@triton.jit
def load_rows(p_x, i_first, N, stride_n, o_d, D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """Rows i_first.. [ROWS, BLOCK_D] of one head, 0 beyond N and beyond D."""
    p = row_pointers(p_x, i_first, stride_n, o_d, ROWS)
    if MASKED:
        return tl.load(p, mask=row_mask(i_first, N, o_d, D, ROWS), other=0.0)
    if o_d.shape[0] != D:
        return tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    return tl.load(p)


@triton.jit
def store_rows(p_x, i_first, N, stride_n, o_d, D: tl.constexpr, ROWS: tl.constexpr, b_x):
    p = row_pointers(p_x, i_first, stride_n, o_d, ROWS)
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=row_mask(i_first, N, o_d, D, ROWS))


@triton.jit
def fold(b_q, p_q_weight, p_k_weight, b_rstd, i_h, o_d, scale_log2, D: tl.constexpr):
    """The query tile with both weights, its own statistics and the scale: in float32, rounded once to its dtype."""
    b_weight = load_head_weight(p_q_weight, i_h, o_d, D) * load_head_weight(p_k_weight, i_h, o_d, D)  # [BLOCK_D]
    return (b_q.to(tl.float32) * (b_rstd * scale_log2)[:, None] * b_weight[None, :]).to(b_q.dtype)


@triton.jit
def load_head_weight(p_weight, i_h, o_d, D: tl.constexpr):
    return tl.load(p_weight + i_h * D + o_d, mask=o_d < D, other=0.0).to(tl.float32)


@triton.jit
def scaled_scores(b_s, p_rstd_k, o_n, N, scale_log2, MASKED: tl.constexpr):
    """Scores in units of log2, -inf beyond the last key."""
    if p_rstd_k is not None:
        b_s *= tl.load(p_rstd_k + o_n, mask=o_n < N, other=0.0)[None, :]
    else:
        b_s *= scale_log2
    if MASKED:
        b_s = tl.where((o_n < N)[None, :], b_s, float("-inf"))
    return b_s
