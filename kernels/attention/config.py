"""Tiles, warps and stages of the attention kernels, by head dimension, dtype and target."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from internvit.kernels.attention.tiles import LAST_AGAIN
from internvit.kernels.common import config as configs
from internvit.kernels.common import launch
from internvit.kernels.common.rows import contiguous
from internvit.kernels.common.sizes import cdiv, next_power_of_2
from internvit.kernels.common.strides import head_strides, token_strides
from internvit.kernels.common.target import Target


@dataclass(frozen=True)
class AttentionConfig:
    """Attributes:
    rows: of the tile a program keeps (queries in `forward` and `grad_q`, keys in `grad_kv` and
        `column_sums`).
    columns: of the tiles it walks over.
    warps: warps of a program.
    stages: loads in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def programs(self, tokens: int) -> int:
        """How many keep a tile of one head each."""
        return cdiv(tokens, self.rows)

    def peeling(self, kept: int, walked: int | None = None) -> tuple[bool, bool, bool]:
        """Whether the first token alone is left over by whole tiles of `rows`, and of `columns`, as the class token is
        at 1025; and whether the walk over tiles of `columns` has to mask its last one. `walked`: tokens of the walk,
        where they are not as many."""
        walked = kept if walked is None else walked
        rows, columns = (n > 1 and n % tile == 1 for n, tile in ((kept, self.rows), (walked, self.columns)))
        return rows, columns, walked % self.columns != 0 and not columns

    @classmethod
    def rule(cls, kernel: str, head_dim: int, itemsize: int, target: Target) -> "AttentionConfig":
        """Picked from what the compilers make of them (`static_profile`): the largest tiles that spill with none of
        Triton 3.6, 3.8 and 3.9, on each family of matrix instructions its own, with no more stages than the target's
        shared memory holds.

        wgmma works on 64 rows a warp group: at D = 128 backward tiles of 64 rows and 8 warps leave two groups with the
        same work. Per 64 x 64 scores, grad_kv and grad_q together issue 940 cycles of instructions instead of 1740 and
        1792 of tensor core instead of 2816 with 128 x 32 and 128 x 64; grad_kv spills with 128 x 64. tcgen05 keeps
        accumulators in tensor memory: 128 x 64 fit. mma, D = 64: grad_kv's 128 x 64 takes all 255 registers and
        spills 12 bytes in 3.6, grad_q's with QK-norm 12 in 3.8; 128 x 32 take 186 and 182. mma, D = 128: with 64 x 32
        tiles and 8 warps grad_kv issues 1.5 times the products needed, 128 x 32 spill 104 bytes. mfma, D = 128:
        64 x 64 spills and 64 x 32 does not. wmma's operands fill both halves of a wave, 256 registers a lane:
        grad_kv spills 20 bytes with 32 x 16 tiles at D = 128, none with 16 x 16.

        Where D is no power of two masks take registers: half the columns. float32 products are exact and run without
        tensor cores (`input_precision="tf32x3"` with them: docs/numerics.md): at D = 128 backward spills 400 bytes with
        32 x 16 tiles, none with 16 x 16 and eight warps, 404 again with four. mfma has float32 instructions and 512
        registers a lane: 64 x 32 tiles spill none at D = 128 and take 6 to 8 times fewer instructions a score than 16 x
        16; where D is no power of two they do spill.
        D = 64 on sm_100: where tiles leave tokens over forward spills 8 bytes at 128 registers; with none it has 131
        and half the programs a multiprocessor, or tiles of 32 keys and 38 % more instructions.
        """
        config = cls._rule(kernel, head_dim, itemsize, target.matrix_instructions)
        while config.stages > 1 and config.shared_bytes(head_dim, itemsize, target) > target.shared_bytes:
            config = dataclasses.replace(config, stages=config.stages - 1)
        return config

    def shared_bytes(self, head_dim: int, itemsize: int, target: Target) -> int:
        """Shared memory of two tiles for each stage in flight; wgmma and tcgen05 read the kept tile from it too."""
        kept = 0 if target.matrix_instructions == "mma" else self.rows
        block_d = max(16, next_power_of_2(head_dim))
        return (2 * self.stages * self.columns + kept) * block_d * itemsize + 4096

    @classmethod
    def _rule(cls, kernel: str, head_dim: int, itemsize: int, instructions: str) -> "AttentionConfig":
        wide, whole = head_dim > 64, head_dim == next_power_of_2(head_dim)
        if kernel == "delta":
            return cls(64, 0, 4, 1)
        if itemsize == 4 and not (instructions == "mfma" and whole):
            return cls(16 if wide else 32, 16 if wide else 32, 8, 1)
        if instructions == "mfma":
            if kernel in ("forward", "column_sums") and itemsize == 2:
                return cls(128, 64, 8 if wide else 4, 1)
            return cls(64 if wide else 128, 32, 4, 1)
        if instructions == "wmma":
            if kernel == "grad_kv":
                return cls(16 if wide else 32, 16, 4, 1)
            return cls(
                64 if kernel in ("forward", "column_sums") else 32,
                16 if wide and kernel == "grad_q" else 32,
                8 if wide else 4,
                1,
            )
        if kernel == "column_sums":  # one product, and its sums alone are kept: 128 x 64 take 60 to 168 registers
            return cls(128, 64 if whole else 32, 8, 2)
        if kernel == "forward":  # D = 64 on sm_100: a third stage spills 4 bytes at 128 registers, two spill none
            return cls(128, 64 if whole else 32, 8, 2 if instructions == "tcgen05" and not wide else 3)
        if instructions == "mma" and not (wide and whole):
            return cls(32 if wide and kernel == "grad_kv" else 64 if wide else 128, 32, 8, 2)
        if instructions == "mma":
            return cls(64, 64, 8, 2)
        if instructions == "wgmma" and wide and whole:
            return cls(128, 32 if kernel == "grad_kv" else 64, 8, 2)
        return cls(128 if (instructions == "tcgen05" and whole) or not wide else 64, 64 if whole else 32, 8, 2)


@functools.cache
def attention_config(kernel: str, head_dim: int, dtype: torch.dtype, target: Target) -> AttentionConfig:
    return configs.choose(
        AttentionConfig,
        f"attention_{kernel}",
        tuned_key(head_dim, dtype),
        target,
        lambda: AttentionConfig.rule(kernel, head_dim, dtype.itemsize, target),
    )


def tuned_key(head_dim: int, dtype: torch.dtype) -> str:
    return f"D={head_dim},bytes={dtype.itemsize}"


def call(kernel: str, q: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """`function(config, *args)` with the configuration of attention's `kernel` for q [B, N, H, D]."""
    head_dim = q.shape[-1]
    config = attention_config(kernel, head_dim, q.dtype, launch.target_of(q))
    if not configs.recording():
        return function(config, *args)
    return configs.call(f"attention_{kernel}", tuned_key(head_dim, q.dtype), config, function, *args)


class QKNorm(NamedTuple):
    """QK-norm's weights [H * D] and statistics [B, N]: all given, or all None for attention without it."""

    q_weight: Tensor | None
    k_weight: Tensor | None
    rstd_q: Tensor | None
    rstd_k: Tensor | None

    def contiguous(self) -> "QKNorm":
        return QKNorm(*map(contiguous, self))


@dataclass(frozen=True)
class Sequences:
    """The sequences of a pack [total, H, D]: sequence b has the tokens cu_seqlens[b] to cu_seqlens[b + 1].

    Attributes:
        cu_seqlens: [B + 1] int32, from 0 to total, on the tokens' device.
        max_seqlen: the tokens of the longest sequence, or more.
        cu_seqlens_k, max_seqlen_k: the same of keys and values, where they are not the queries'.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None

    def contiguous(self) -> "Sequences":
        ends_k = contiguous(self.cu_seqlens_k)
        return Sequences(self.cu_seqlens.contiguous(), self.max_seqlen, ends_k, self.max_seqlen_k)

    @property
    def count(self) -> int:
        return self.cu_seqlens.numel() - 1

    def kept_and_walked(self, keeps: Literal["queries", "keys"]) -> tuple[Tensor, Tensor | None, int]:
        """The ends of the sequences that programs keep tiles of; of those they walk over, where they are others; the
        longest that is kept."""
        if self.cu_seqlens_k is None or self.max_seqlen_k is None:
            return self.cu_seqlens, None, self.max_seqlen
        if keeps == "queries":
            return self.cu_seqlens, self.cu_seqlens_k, self.max_seqlen
        return self.cu_seqlens_k, self.cu_seqlens, self.max_seqlen_k


def masks_every_tile(head_dim: int, itemsize: int, target: Target) -> bool:
    """Whether a pack's keys are masked in every tile of the loop; else in a copy of its body behind it, for the tile
    that is not whole, which tensor cores that are no bound without masks ask for: on sm_90 and D = 64 forward takes 293
    cycles of instructions for 64 x 64 scores instead of 377, and grad_q 286 instead of 371.

    With mma and wide heads tensor cores are the bound (1024 cycles on sm_80, 655 of instructions with all masks), and
    with the copy grad_q spills 560 bytes on sm_120. On CDNA the copy takes twice the shared memory. In float32 the copy
    makes forward spill 240 and grad_q 1316 bytes on sm_90, and masks add at most 1.5 % of instructions.
    grad_kv masks each tile: what is masked there is lse, a load of a row.
    """
    family = target.matrix_instructions
    return itemsize == 4 or family in ("mfma", "wmma") or (family == "mma" and head_dim > 64)


def pack_peeling(config: AttentionConfig, target: Target) -> tuple[bool, bool]:
    """Of a pack: whether a kept sequence's first token has a program of its own, and a walked one's a product.

    With a token apart grad_kv spills 8 bytes on sm_100 at D = 128, and 16 on gfx1100. Eight warps of CDNA have 256
    registers a lane: with a key apart forward takes 249 to 256 of them at D = 128, and spills 72 bytes on gfx942 with
    Triton 3.9; without, 204.
    """
    family = target.matrix_instructions
    peel_row = family != "wmma"
    crowded = family == "tcgen05" or (family == "mfma" and config.warps == 8)
    return peel_row, peel_row and not crowded


def target_options(keeps: Literal["queries", "keys"], head_dim: int, masked: bool, target: Target) -> dict[str, int]:
    """Options that one family of targets has. With wmma, wide heads and a masked walk LLVM keeps registers free for
    more waves than fit, and grad_kv spills 4 bytes on gfx1100; told of one wave, none."""
    wide = head_dim > 64 and target.matrix_instructions == "wmma"
    return {"waves_per_eu": 1} if wide and masked and keeps == "keys" else {}


def head_blocks(head_dim: int) -> dict[str, int]:
    """The constants of a kernel that say how a head's dimension is padded."""
    return {"D": head_dim, "BLOCK_D": max(16, next_power_of_2(head_dim))}


def run_tiles(
    kernel: Any,
    config: AttentionConfig,
    keeps: Literal["queries", "keys"],
    pointers: Sequence[Tensor | None],
    strided: Sequence[Tensor],
    scale: float,
    sequences: Sequences | None = None,
) -> None:
    """Starts `kernel`, a program for each tile of queries or of keys that it keeps while it walks over the others.

    Each sequence of a pack gets the programs of the longest; those beyond its end have nothing to do. The kernel reads
    from cu_seqlens whether whole tiles leave a sequence's first token over. Programs that look their sequence up among
    all tiles would be fewer, but each would wait for a search through cu_seqlens.

    Args:
        pointers: the kernel's first arguments.
        strided: those of them that are read and written by strides, each [B, N, H, D], or [1, total, H, D] of a pack:
            queries first, then keys.
        scale: the kernel's last argument.
    """
    B, N, H, D = strided[0].shape
    walked = strided[1].shape[1]
    if keeps == "keys":
        N, walked = walked, N
    tail: int
    target = launch.target_of(strided[0])
    if sequences is None:
        ends, ends_walked, programs = None, None, config.programs(N)
        strides, unit = head_strides(*strided)
        peel_row, peel_column, tail = config.peeling(N, walked)
    else:
        ends, ends_walked, longest = sequences.kept_and_walked(keeps)
        programs = config.programs(longest)
        B = sequences.count if N else 0
        strides, unit = token_strides(*strided)
        peel_row, peel_column = pack_peeling(config, target)
        tail = LAST_AGAIN.value if keeps == "keys" or masks_every_tile(D, strided[0].itemsize, target) else 0
    queries, keys = (config.rows, peel_row), (config.columns, peel_column)
    if keeps == "keys":
        queries, keys = keys, queries
    launch.run(
        kernel,
        (programs * B * H,),
        *(*pointers, ends, ends_walked, N, None if walked == N else walked, H, programs, *strides, scale),
        **head_blocks(D),
        STRIDE_UNIT=unit,
        BLOCK_M=queries[0],
        BLOCK_N=keys[0],
        PEEL_QUERY=queries[1],
        PEEL_KEY=keys[1],
        TAIL=tail,
        num_warps=config.warps,
        num_stages=config.stages,
        **target_options(keeps, D, bool(tail), target),
    )
