"""A norm inside two GEMMs: its statistics in the epilogue of the one before, the rest in that of the one behind.

    y = rstd * (x weight^T - mean * weight_sum) + bias                                    or gelu of that
    y = residual + gamma * (x weight^T + bias),  mean and rstd of y's rows

The weight holds the norm's own: weight = norm_weight * W, whose columns `weight_sum` adds up as rounded, so that the
mean is taken away exactly. x is the stream: nothing writes or reads the normed rows.

A program writes the sums of its columns of y, as rounded and stored: mean and mean square deviation of each PIECE
columns, or the mean square alone. A second kernel adds the pieces of a row, always in one order, by Chan's formula:

    mean = sum n_i / C * mean_i,  variance = sum m2_i + sum n_i / C * (mean_i - mean)^2

Of qkv, the mean squares of q's and of k's columns are QK-norm's statistics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch
from internvit.kernels.common.rows import contiguous, empty_statistics
from internvit.kernels.common.sizes import cdiv, next_power_of_2
from internvit.kernels.gelu import exact_gelu
from internvit.kernels.linear import (
    MAX_STRIDE,
    LinearConfig,
    halves,
    linear_config,
    operand,
    products,
    tile_of_program,
    tile_pointers,
)
from internvit.kernels.norm import LEAST_EPS, is_small

ROWS = 32
"""Rows of a program that adds up pieces."""


@triton.jit
def store_piece(p_partials, b_y, m_y, i_m, i_piece, M, N, inverse_width, pieces, STATISTICS: tl.constexpr):
    """Mean and m2, or m2 about 0, of the columns of b_y [BLOCK_M, PIECE], over the row's width: [sums, pieces, M]."""
    o_m = i_m * b_y.shape[0] + tl.arange(0, b_y.shape[0])
    p_piece = p_partials + i_piece.to(tl.int64) * M + o_m
    m_piece = (o_m < M) & (i_piece < pieces)
    b_y = tl.where(m_y, b_y, 0.0)
    if STATISTICS == "layer_norm":
        b_mean = tl.sum(b_y, 1) / tl.minimum(N - i_piece * b_y.shape[1], b_y.shape[1])
        tl.store(p_piece, b_mean, mask=m_piece)
        b_y = tl.where(m_y, b_y - b_mean[:, None], 0.0)
        p_piece += tl.cast(pieces, tl.int64) * M
    tl.store(p_piece, tl.sum(b_y * (b_y * inverse_width), 1), mask=m_piece)


@triton.jit
def finish(
    b_y,  # [BLOCK_M, PIECE] float32, products
    p_bias, p_mean, p_rstd, p_weight_sum, p_gamma, p_residual, p_partials, p_y,
    i_m, i_piece, M, N, stride_residual, inverse_width, pieces,
    GELU: tl.constexpr, STATISTICS: tl.constexpr, BLOCK_M: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The epilogue of tile (i_m, i_piece), and its stores."""
    o_n = i_piece * PIECE + tl.arange(0, PIECE)  # [PIECE]
    m_n = o_n < N
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_y = (o_m < M)[:, None] & m_n[None, :]  # [BLOCK_M, PIECE]
    if p_mean is not None:
        b_mean = tl.load(p_mean + o_m, mask=o_m < M, other=0.0)
        b_y -= b_mean[:, None] * tl.load(p_weight_sum + o_n, mask=m_n, other=0.0)[None, :]
    if p_rstd is not None:
        b_y *= tl.load(p_rstd + o_m, mask=o_m < M, other=0.0)[:, None]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if GELU:
        b_y = exact_gelu(b_y.to(p_y.dtype.element_ty).to(tl.float32))
    if p_gamma is not None:
        b_y *= tl.load(p_gamma + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if p_residual is not None:
        p_r = tile_pointers(p_residual, i_m, stride_residual, o_n, BLOCK_M)
        b_y += tl.load(p_r, mask=m_y, other=0.0).to(tl.float32)
    b_out = b_y.to(p_y.dtype.element_ty)
    tl.store(tile_pointers(p_y, i_m, N, o_n, BLOCK_M), b_out, mask=m_y)
    if p_partials is not None:
        store_piece(p_partials, b_out.to(tl.float32), m_y, i_m, i_piece, M, N, inverse_width, pieces, STATISTICS)


@triton.jit(do_not_specialize=["M"])
def norm_linear_kernel(
    p_x,  # [M, K]
    p_weight,  # [N, K]
    p_bias,  # [N] or None
    p_mean,  # [M] or None
    p_rstd,  # [M] or None
    p_weight_sum,  # [N] or None, with mean
    p_gamma,  # [N] or None
    p_residual,  # [M, N] or None
    p_partials,  # [sums, pieces, M] float32 or None
    p_y,  # [M, N]
    M, N, K,
    stride_x, stride_weight, stride_residual,
    inverse_width,
    pieces,
    GELU: tl.constexpr, STATISTICS: tl.constexpr, WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    i_m, i_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP)
    b_y = products(p_x, p_weight, i_m, i_n, M, N, K, stride_x, stride_weight, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K)
    b_left, b_right = halves(b_y)
    tensors = (p_bias, p_mean, p_rstd, p_weight_sum, p_gamma, p_residual, p_partials, p_y)
    sizes = (M, N, stride_residual, inverse_width, pieces)
    finish(b_left, *tensors, i_m, 2 * i_n, *sizes, GELU, STATISTICS, BLOCK_M, BLOCK_N // 2)
    finish(b_right, *tensors, i_m, 2 * i_n + 1, *sizes, GELU, STATISTICS, BLOCK_M, BLOCK_N // 2)


@triton.jit(do_not_specialize=["M"])
def add_pieces_kernel(
    p_partials,  # [sums, pieces, M] float32
    p_mean,  # [M] or None
    p_rstd,  # [M], of the first PIECES
    p_rstd_next,  # [M] or None, of the PIECES behind them
    M, C,
    pieces,
    eps,
    PIECES: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The statistics of rows of C columns from those of their pieces, or of two rows of C columns side by side."""
    o_rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    o_pieces = tl.arange(0, BLOCK_P)  # [BLOCK_P]
    m_tile = (o_pieces < PIECES)[:, None] & (o_rows < M)[None, :]
    o_tile = (tl.program_id(1) * PIECES + o_pieces).to(tl.int64)[:, None] * M + o_rows[None, :]
    if p_mean is not None:
        b_share = tl.maximum(tl.minimum(C - o_pieces * PIECE, PIECE), 0).to(tl.float32)[:, None] / C  # [BLOCK_P, 1]
        b_means = tl.load(p_partials + o_tile, mask=m_tile, other=0.0)
        b_mean = tl.sum(b_means * b_share, 0)
        b_off = tl.where(m_tile, b_means - b_mean[None, :], 0.0)
        b_between = tl.sum(b_off * (b_off * b_share), 0)
        tl.store(p_mean + o_rows, b_mean, mask=o_rows < M)
        o_tile += tl.cast(M, tl.int64) * pieces
        b_variance = tl.sum(tl.load(p_partials + o_tile, mask=m_tile, other=0.0), 0) + b_between
    else:
        b_variance = tl.sum(tl.load(p_partials + o_tile, mask=m_tile, other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(p_rstd + o_rows, tl.rsqrt(b_variance + eps), mask=o_rows < M)
    elif p_rstd_next is not None:
        tl.store(p_rstd_next + o_rows, tl.rsqrt(b_variance + eps), mask=o_rows < M)


def _multiply(
    config: LinearConfig,
    x: Tensor,
    weight: Tensor,
    vectors: dict[str, Tensor | None],
    residual: Tensor | None,
    gelu: bool,
    statistics: str,
    width: int,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N], and the partial sums [sums, pieces, M] for rows of `width` columns; `statistics` "none" for none."""
    x_rows, weight_rows = operand(x), operand(weight)
    residual_rows = None if residual is None else operand(residual)
    (M, K), N = x_rows.shape, weight.shape[0]
    if N >= MAX_STRIDE:
        raise ValueError(f"norm_linear: weight must have fewer than {MAX_STRIDE} rows, got {N}")
    y = x.new_empty((*x.shape[:-1], N), dtype=x.dtype)
    pieces, partials = cdiv(N, config.columns // 2), None
    if statistics != "none":
        partials = empty_statistics(x, (2 if statistics == "layer_norm" else 1, pieces, M))
    given = {name: contiguous(t) for name, t in vectors.items()}
    launch.run(
        norm_linear_kernel,
        (cdiv(M, config.rows) * cdiv(N, config.columns),),
        *(x_rows, weight_rows, given.get("bias"), given.get("mean"), given.get("rstd"), given.get("weight_sum")),
        *(given.get("gamma"), residual_rows, partials, y, M, N, K, x_rows.stride(0), weight_rows.stride(0)),
        *(0 if residual_rows is None else residual_rows.stride(0), 1.0 / width, pieces),
        GELU=gelu,
        STATISTICS=statistics,
        WHOLE_K=K % config.depth == 0,
        **config.constants(),
    )
    return y, partials


def _add_pieces(
    partials: Tensor, width: int, config: LinearConfig, eps: float, parts: int = 1
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """mean [M] (None of mean squares), and rstd [M] of the first `width` columns, and with two `parts` of the next."""
    sums, pieces, M = partials.shape
    piece = config.columns // 2
    rstd = empty_statistics(partials, (M,))
    mean = torch.empty_like(rstd) if sums == 2 else None
    rstd_next = torch.empty_like(rstd) if parts == 2 else None
    launch.run(
        add_pieces_kernel,
        (cdiv(M, ROWS), parts),
        *(partials, mean, rstd, rstd_next, M, width, pieces, eps),
        PIECES=cdiv(width, piece),
        PIECE=piece,
        ROWS=ROWS,
        BLOCK_P=next_power_of_2(cdiv(width, piece)),
        num_warps=4,
    )
    return mean, rstd, rstd_next


def _config(x: Tensor, weight: Tensor) -> LinearConfig:
    return linear_config("norm_linear", weight.shape[1], weight.shape[0], x.dtype, launch.target_of(x))


def multiply_normed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_sum: Tensor | None,
    gelu: bool,
) -> Tensor:
    """y of `norm_linear`."""
    vectors = {"bias": bias, "rstd": rstd, "mean": mean, "weight_sum": weight_sum}
    return _multiply(_config(x, weight), x, weight, vectors, None, gelu, "none", 1)[0]


def project_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_sum: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """qkv, rstd_q and rstd_k of `norm_qkv`; None where a program's columns are of q and of k, or eps hides nothing."""
    config, width = _config(x, weight), weight.shape[0] // 3
    if width % (config.columns // 2) or is_small(eps):
        return None
    vectors = {"bias": bias, "rstd": rstd, "mean": mean, "weight_sum": weight_sum}
    qkv, partials = _multiply(config, x, weight, vectors, None, False, "rms_norm", width)
    assert partials is not None
    _, rstd_q, rstd_k = _add_pieces(partials, width, config, eps, 2)
    assert rstd_k is not None
    return qkv, rstd_q.view(x.shape[:-1]), rstd_k.view(x.shape[:-1])


def add_with_statistics(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, residual: Tensor, eps: float, norm_type: str
) -> tuple[Tensor, Tensor | None, Tensor]:
    """y, mean (None for RMSNorm) and rstd of `linear_residual_stats`."""
    if is_small(eps):
        raise ValueError(
            f"linear_residual_stats: eps must be at least {LEAST_EPS} for backend 'triton_gemm', got {eps}"
        )
    config, width = _config(x, weight), weight.shape[0]
    y, partials = _multiply(config, x, weight, {"bias": bias, "gamma": gamma}, residual, False, norm_type, width)
    assert partials is not None
    mean, rstd, _ = _add_pieces(partials, width, config, eps)
    rows = x.shape[:-1]
    return y, None if mean is None else mean.view(rows), rstd.view(rows)
