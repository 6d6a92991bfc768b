"""Tiles of one head's rows: which one a program keeps, and how it is read and written."""

import triton
import triton.language as tl

LONE_ROWS = tl.constexpr(16)
"""Rows of the tile that takes a single query or key: the least that matrix instructions have. Without them a single
query took 288 instructions a tile of keys at D = 64 and 488 at D = 128 with QK-norm, all its loads waited for; as one
tile of 16 rows 168 and 217, and the loads are pipelined (sm_90)."""


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
        b_x = tl.load(p, mask=row_mask(i_first, N, o_d, D, ROWS), other=0.0)
    elif o_d.shape[0] != D:
        b_x = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p)
    return b_x


@triton.jit
def load_rows_or_last(p_x, i_first, N, stride_n, o_d, D: tl.constexpr, ROWS: tl.constexpr):
    """Rows i_first.. [ROWS, BLOCK_D] of one head, the last one again beyond N, 0 beyond D: for rows whose weight is 0.

    Loads without a mask on rows: at D = 128 with QK-norm grad_kv takes 171 registers a thread on sm_86 and sm_89 where
    the last tile of queries is not whole; masked it took 255 and spilled 8 bytes.
    """
    o_tile = tl.minimum(tl.arange(0, ROWS), N - 1 - i_first)[:, None] * stride_n + o_d[None, :]
    p = p_x + tl.cast(i_first, tl.int64) * stride_n + o_tile
    if o_d.shape[0] != D:
        b_x = tl.load(p, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p)
    return b_x


@triton.jit
def store_rows(p_x, i_first, N, stride_n, o_d, D: tl.constexpr, ROWS: tl.constexpr, b_x):
    p = row_pointers(p_x, i_first, stride_n, o_d, ROWS)
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=row_mask(i_first, N, o_d, D, ROWS))


@triton.jit
def tile_of_program(programs, H, LONE_TILE: tl.constexpr):
    """The tile of this program, i_b * H + i_h, its image i_b and its head i_h; each head has `programs` tiles.

    LONE_TILE: a head's last tile is a single row. Those start after all whole tiles, so that they fill the last wave
    of programs and delay none: at one image of InternViT-300M 128 large programs and 16 small ones run on 132
    multiprocessors, where in the order of heads ten got two large ones.
    """
    i_program = tl.program_id(0)
    if LONE_TILE:
        i_lone = i_program - tl.num_programs(0) // programs * (programs - 1)
        i_tile = tl.where(i_lone < 0, i_program % tl.maximum(programs - 1, 1), programs - 1)
        i_bh = tl.where(i_lone < 0, i_program // tl.maximum(programs - 1, 1), i_lone)
    else:
        i_tile = i_program % programs
        i_bh = i_program // programs
    i_bh = i_bh.to(tl.int64)
    return i_tile, i_bh, i_bh // H, i_bh % H


@triton.jit
def one_head(p_x, i_b, i_h, stride_b, stride_n, stride_h, STRIDE_UNIT: tl.constexpr):
    """Pointer to the first token of one head of x [B, N, H, D], and the stride of its tokens in elements."""
    return p_x + (i_b * stride_b + i_h * stride_h) * STRIDE_UNIT, stride_n * STRIDE_UNIT
