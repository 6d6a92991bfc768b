"""What the kernels over rows of C channels share: tiles, configuration, and the sum of partial rows.

A program holds `rows` whole rows in registers, so that each activation is read once. Kernels that also sum over rows
(gradients of parameters) run as many programs as a GPU holds at a time; each walks over its rows, keeps float32 sums in
registers and writes one partial row, and a second kernel adds the partial rows in a fixed order. No atomics: the same
input gives the same bits on one GPU; another GPU has other multiprocessors, and adds in another order.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import config as configs
from internvit.kernels.common import launch
from internvit.kernels.common.sizes import cdiv, next_power_of_2
from internvit.kernels.common.target import Target

MAX_CHANNELS = 8192
ONE_TENSOR = ("per_token_quant", "gelu_quant")
"""They hold one row alone, of twice as many channels: the MLP's of 6B has 12800."""
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class RowConfig:
    """Attributes:
    rows: rows of a program's tile.
    warps: warps of a program.
    """

    rows: int
    warps: int

    @classmethod
    def rule(cls, channels: int) -> "RowConfig":
        """2048 elements a tile or a whole row, 16 elements a thread: two 16-byte loads in flight per tensor in bf16.

        At C = 1024 four rows a program instead of two put a layout conversion between gamma and the tile (4 KiB of
        shared memory instead of 32 bytes, 53 % of loads and stores 16 bytes wide instead of 73 %, 8 bytes spilled).
        3200 columns take a masked 4096: 22 % of lanes idle, but one barrier and 16-byte loads, where exact chunks of
        128 cost 49 barriers and narrow loads. The rule does not see the number of rows, so that a row's result does
        not depend on its batch; for the same reason kernels are not specialised on it (`do_not_specialize`).
        """
        block = next_power_of_2(channels)
        rows = max(1, min(16, 2048 // block))
        return cls(rows, max(1, min(16, rows * block // 512)))

    def constants(self, channels: int) -> dict[str, int]:
        """Of a kernel over rows of `channels`: its width, its tile and its warps."""
        block = next_power_of_2(channels)
        return {"C": channels, "ROWS": self.rows, "BLOCK_C": block, "num_warps": self.warps}


FUSED = "layer_scale_residual_norm"
FOLLOWERS = (
    "rms_norm",
    "layer_norm",
    "layer_scale_residual",
    "rms_norm_quant",
    "layer_norm_quant",
    "layer_scale_residual_norm_quant",
)
"""They take the measured configurations of FUSED, forward and backward: it fixes the order of a row's sums and of those
over rows, and the fused op and its parts give the same bits."""


@functools.cache
def row_config(kernel: str, channels: int, target: Target) -> RowConfig:
    widest = MAX_CHANNELS * (2 if kernel in ONE_TENSOR else 1)
    if channels > widest:
        raise ValueError(
            f"{kernel}: the last dimension must be at most {widest} for backend 'triton' (a program holds a "
            f"whole row), got {channels}; use backend='reference'"
        )
    op = kernel.removesuffix("_backward")
    measured = kernel.replace(op, FUSED) if op in FOLLOWERS else kernel
    return configs.choose(RowConfig, measured, f"C={channels}", target, lambda: RowConfig.rule(channels))


def call(kernel: str, channels: int, x: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """`function(config, *args)` with `kernel`'s configuration for rows of `channels` on x's device."""
    config = row_config(kernel, channels, launch.target_of(x))
    if not configs.recording() or kernel.removesuffix("_backward") in FOLLOWERS:  # nothing of theirs is measured
        return function(config, *args)
    return configs.call(kernel, f"C={channels}", config, function, *args)


def configured(kernel: str, by: int = 0) -> Callable[[Callable[Concatenate[RowConfig, P], R]], Callable[P, R]]:
    """Decorates a launch function: called without its first argument, it gets `kernel`'s configuration for the rows of
    its tensor number `by`."""

    def decorate(function: Callable[Concatenate[RowConfig, P], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def configure(*args: P.args, **kwargs: P.kwargs) -> R:
            x: Any = args[by]
            result: R = call(kernel, x.shape[-1], x, function, *args, **kwargs)
            return result

        return configure

    return decorate


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [M, C], contiguous in C: a view where one stride leads from row to row, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def dense_rows(x: Tensor) -> Tensor:
    """x where it is contiguous, which spares a view (1 us), else `as_rows(x)`; see `size` and `strides.row_strides`."""
    return x if x.is_contiguous() else as_rows(x)


def size(x: Tensor) -> tuple[int, int]:
    """The number of rows of x [..., C], and C."""
    channels = x.shape[-1]
    return x.numel() // channels, channels


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An output of x's shape, not filled; half the host time of `x.new_empty(x.shape)`, 1 us."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


@functools.lru_cache(4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    return tuple(max(1, prod(shape[i + 1 :])) for i in range(len(shape)))


def empty_statistics(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """float32, contiguous, not filled; `x.new_empty` takes a part of x's shape 0.7 us later."""
    return torch.empty_strided(shape, _strides(shape), dtype=torch.float32, device=x.device)


RESIDENT_WARPS = {"mfma": 20, "wmma": 40}  # else 12


def persistent_programs(rows: int, config: RowConfig, target: Target) -> int:
    """Programs of a kernel that sums over `rows` rows: as many as `target` holds at a time, the nearest number to
    RESIDENT_WARPS on each multiprocessor.

    The warps are those of the fused backward with all sums, whose 16 elements a thread take the most registers: up to
    168 on NVIDIA, 92 on CDNA, 140 of the larger file of RDNA. 12 warps are three programs at C = 1024 (two before, a
    third of the registers idle) and two at C = 3200. The compiled kernel is not asked: its parts, or other dtypes and
    frozen parameters, would get other numbers, and their sums over rows other bits than the fused op's.
    Fewer start where all have to take as many tiles: 257 instead of 396 for one image of 1025 tokens at C = 1024, two
    tiles each, and a third fewer partial rows.
    """
    warps = RESIDENT_WARPS.get(target.matrix_instructions, 12)
    resident = max(1, (warps + config.warps // 2) // config.warps)
    tiles = cdiv(rows, config.rows)
    return cdiv(tiles, max(1, cdiv(tiles, resident * target.multiprocessors)))


@triton.jit
def columns(BLOCK_C: tl.constexpr, dtype_a: tl.constexpr, dtype_b: tl.constexpr):
    """Column numbers [BLOCK_C] for rows of tensors of two dtypes.

    Where one is float32 and the other has 16 bits, four neighbours a thread for both: the compiler would else take
    eight, and a row's sums would be added in another order than by the kernels that read float32 alone (36 % of float32
    sums of squares differed in bits at C = 1024).
    """
    o_cols = tl.arange(0, BLOCK_C)
    if dtype_a.primitive_bitwidth != dtype_b.primitive_bitwidth:
        o_cols = tl.max_contiguous(o_cols, 4)
    return o_cols


@triton.jit
def row_tile(i_tile, M, o_cols, C: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers (int64, for offsets beyond 2^31) and masks of tile i_tile."""
    o_rows = tl.cast(i_tile, tl.int64) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    m_rows = o_rows < M
    return o_rows, m_rows, m_rows[:, None] & (o_cols < C)[None, :]


@triton.jit
def load_tile(p_x, o_rows, stride, o_cols, m_tile):
    """A tile in float32, 0 where masked; one 16-bit value widened is exact."""
    return tl.load(p_x + o_rows[:, None] * stride + o_cols[None, :], mask=m_tile, other=0.0).to(tl.float32)


@triton.jit
def store_tile(p_x, o_rows, stride, o_cols, m_tile, b_x):
    tl.store(p_x + o_rows[:, None] * stride + o_cols[None, :], b_x.to(p_x.dtype.element_ty), mask=m_tile)


@triton.jit
def load_vector(p_x, o_cols, C: tl.constexpr):
    return tl.load(p_x + o_cols, mask=o_cols < C, other=0.0).to(tl.float32)


@triton.jit
def product(b_x, b_y):
    """x * y rounded, a term of a sum over a row. The compiler contracts a bare product with the addition behind it or
    not, as what stands around it suits: on sm_100 and sm_120, whose multiply-adds come in pairs, the fused op and its
    parts added a row's squares with other roundings."""
    return tl.fma(b_x, b_y, tl.zeros_like(b_x))


@triton.jit
def store_partial(p_partials, i_sum, b_sum, o_cols, C: tl.constexpr):
    """Writes the column sums of b_sum [ROWS, BLOCK_C] as this program's partial row of sum number i_sum."""
    o_row = (i_sum * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * C
    tl.store(p_partials + o_row + o_cols, tl.sum(b_sum, 0), mask=o_cols < C)


@triton.jit(do_not_specialize=["P"])
def sum_partials_kernel(
    p_partials,  # [sums, P, C] float32
    p_out_0,
    p_out_1,
    p_out_2,
    P,
    C,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_sum = tl.program_id(1)
    o_cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    m_cols = o_cols < C
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for i_p in range(0, P, BLOCK_P):
        o_p = i_p + tl.arange(0, BLOCK_P)  # [BLOCK_P]
        o_row = (i_sum * P + o_p).to(tl.int64)[:, None] * C
        b_sum += tl.load(p_partials + o_row + o_cols[None, :], mask=(o_p < P)[:, None] & m_cols[None, :], other=0.0)
    b_total = tl.sum(b_sum, 0)  # [BLOCK_C]
    if i_sum == 0:
        tl.store(p_out_0 + o_cols, b_total.to(p_out_0.dtype.element_ty), mask=m_cols)
    if p_out_1 is not None:  # noqa: SIM102 (resolved when compiled, the inner one at run time)
        if i_sum == 1:
            tl.store(p_out_1 + o_cols, b_total.to(p_out_1.dtype.element_ty), mask=m_cols)
    if p_out_2 is not None:  # noqa: SIM102 (resolved when compiled, the inner one at run time)
        if i_sum == 2:
            tl.store(p_out_2 + o_cols, b_total.to(p_out_2.dtype.element_ty), mask=m_cols)


def sum_partials(partials: Tensor, *like: Tensor | None) -> list[Tensor | None]:
    """partials [sums, P, C] float32 -> for each of `like` that is not None a [C] tensor of its dtype and device."""
    outs = [None if t is None else contiguous_like(t) for t in like]
    summed = [out for out in outs if out is not None]
    if summed:
        sums, P, C = partials.shape
        # eight 16-byte loads in flight a thread: 396 partial rows are four rounds that wait for memory, 32 rows 13
        block_p, block_c = 128, 32
        launch.run(
            sum_partials_kernel,
            (cdiv(C, block_c), sums),
            *(partials, *summed, *[None] * (3 - len(summed)), P, C),
            BLOCK_P=block_p,
            BLOCK_C=block_c,
            num_warps=4,
        )
    return outs
