"""Tiles of one head's rows: which one a program keeps, and how it is read and written."""

import triton
import triton.language as tl

LONE_ROWS = tl.constexpr(16)
"""Rows of the tile that takes a single query or key: the least that matrix instructions have. Without them a single
query took 288 instructions a tile of keys at D = 64 and 488 at D = 128 with QK-norm, all its loads waited for; as one
tile of 16 rows 168 and 217, and the loads are pipelined (sm_90)."""

LAST_AGAIN = tl.constexpr(2)
"""A value of MASKED and TAIL: what stands beyond the last row is the last row again, whose weight is 0."""


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
    """Rows i_first.. [ROWS, BLOCK_D] of one head, 0 beyond N and beyond D, or `load_rows_or_last`."""
    p = row_pointers(p_x, i_first, stride_n, o_d, ROWS)
    if MASKED == LAST_AGAIN:
        b_x = load_rows_or_last(p_x, i_first, N, stride_n, o_d, D, ROWS)
    elif MASKED:
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
def leaves_one(N, TILE: tl.constexpr):
    """1 where whole tiles leave one token of N over, which is then taken apart (`AttentionConfig.peeling`), else 0."""
    return ((N > 1) & (N % TILE == 1)).to(tl.int32)


@triton.jit
def tile_of_sequence(p_cu_kept, p_cu_walked, i_tile, i_b, KEPT: tl.constexpr, WALKED: tl.constexpr):
    """What a dense kernel knows of its images, for sequence i_b of a pack.

    p_cu_walked: where the tokens that a program walks over have sequences of their own, else None.

    Returns its first token and its length among the tokens that programs keep, and among those they walk over; its tile
    of a single row, or -1; how many tokens, 0 or 1, are taken apart from the KEPT rows of a program's tile and the
    WALKED rows of the tiles of its loop. A tile beyond the sequence's end is one of an empty sequence: its program
    loads, walks over and writes nothing. A sequence without tokens to walk over begins at token 0, which can be read.
    """
    i_first = tl.load(p_cu_kept + i_b)
    N = tl.load(p_cu_kept + i_b + 1) - i_first
    beyond = i_tile * KEPT >= N
    i_kept = tl.where(beyond, 0, i_first).to(tl.int64)
    N = tl.where(beyond, 0, N)
    i_walked, N_walked = i_kept, N
    if p_cu_walked is not None:
        i_first = tl.load(p_cu_walked + i_b)
        N_walked = tl.where(beyond, 0, tl.load(p_cu_walked + i_b + 1) - i_first)
        i_walked = tl.where(N_walked == 0, 0, i_first).to(tl.int64)
    peeled = leaves_one(N, KEPT)
    return i_kept, N, i_walked, N_walked, tl.where(peeled == 1, N // KEPT, -1), peeled, leaves_one(N_walked, WALKED)


@triton.jit
def place_of_program(
    p_cu_kept, p_cu_walked,  # [B + 1] of a pack, else None
    N, N_walked,  # tokens that programs keep a tile of, and that they walk over; the latter None where they are as many
    H, programs,  # of one head
    KEPT: tl.constexpr, WALKED: tl.constexpr,  # rows of the tiles
    PEEL_KEPT: tl.constexpr, PEEL_WALKED: tl.constexpr,
):  # fmt: skip
    """The tile of this program, and its sequence: image i_b of a batch, or of a pack sequence i_b.

    Returns i_tile, i_bh, i_b and i_h as `tile_of_program`; the tile that is a single row; then of the tokens that
    programs keep, and of those that this one walks over: their place for `one_head`, their number, and how many of
    them, 0 or 1, are taken apart from whole tiles.
    """
    i_tile, i_bh, i_b, i_h = tile_of_program(programs, H, PEEL_KEPT and p_cu_kept is None)
    i_kept, i_walked, i_lone, peeled, peeled_walked = i_b, i_b, programs - 1, 1, 1 if PEEL_WALKED else 0
    if N_walked is None:
        N_walked = N
    if p_cu_kept is not None:
        i_kept, N, i_walked, N_walked, i_lone, peeled, peeled_walked = tile_of_sequence(
            p_cu_kept, p_cu_walked, i_tile, i_b, KEPT, WALKED
        )
        peeled_walked = peeled_walked if PEEL_WALKED else 0
    return i_tile, i_bh, i_b, i_h, i_lone, i_kept, N, peeled, i_walked, N_walked, peeled_walked


@triton.jit
def first_token(i_b, i_image, N, PACKED: tl.constexpr):
    """The first token of a sequence in a tensor [B, N], or of a pack [N], whose tokens i_image counts."""
    return i_image if PACKED else i_b * N


@triton.jit
def first_row(i_bh, i_h, i_image, N, PACKED: tl.constexpr):
    """The first token of one head of a sequence in a tensor [B, H, N], or of a pack [H, N]."""
    return i_h * N + i_image if PACKED else i_bh * N


@triton.jit
def keys_of_sequence(p_k, p_v, N, peeled, stride_kn, stride_vn, BLOCK_N: tl.constexpr, TAIL: tl.constexpr):
    """One head's keys after the `peeled` one, 0 or 1, of a pack's sequence: pointers, their number, and the end of a
    loop over tiles from 0: the last key where every tile is masked, else the last whole tile's.

    Of a loop from `peeled` on, a number that no compiler knows, forward took 446 cycles of instructions for 64 x 64
    scores instead of 377 (sm_90, D = 64)."""
    p_k += peeled * stride_kn
    p_v += peeled * stride_vn
    N -= peeled
    return p_k, p_v, N, N if TAIL else N - N % BLOCK_N


@triton.jit
def one_head(p_x, i_b, i_h, stride_b, stride_n, stride_h, STRIDE_UNIT: tl.constexpr):
    """Pointer to the first token of one head of x [B, N, H, D], and the stride of its tokens in elements.

    Of a pack [total, H, D] i_b is the sequence's first token and stride_b the stride of tokens."""
    return p_x + (i_b * stride_b + i_h * stride_h) * STRIDE_UNIT, stride_n * STRIDE_UNIT
