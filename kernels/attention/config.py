"""Tiles, warps and stages of the attention kernels, by head dimension, dtype and target."""

import functools
from dataclasses import dataclass

import torch
import triton

from internvit.kernels.common import launch
from internvit.kernels.common.launch import Target


@dataclass(frozen=True)
class AttentionLaunch:
    """Attributes:
    rows: of the tile a program keeps (queries in `forward` and `grad_q`, keys in `grad_kv`).
    columns: of the tiles it walks over.
    warps: warps of a program.
    stages: loads in flight.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def peeling(self, tokens: int) -> tuple[bool, bool, bool]:
        """Whether the first token alone is left over by whole tiles of `rows`, and of `columns`, as the class token is
        at 1025; and whether the walk over tiles of `columns` has to mask its last one."""
        rows, columns = (tokens > 1 and tokens % tile == 1 for tile in (self.rows, self.columns))
        return rows, columns, tokens % self.columns != 0 and not columns

    @classmethod
    def rule(cls, kernel: str, head_dim: int, itemsize: int, target: Target) -> "AttentionLaunch":
        """Picked from what the compilers make of them (`static_profile`): the largest tiles that spill with none of
        Triton 3.6, 3.8 and 3.9, on each target its own. D = 128 on sm_90: grad_kv takes 228 registers with 64 x 64
        tiles and spills with 128 x 64; on gfx942 64 x 64 spills and 64 x 32 does not; 128 x 64 backward tiles fit
        sm_100, whose accumulators lie in tensor memory. D = 64 on sm_80: grad_kv's 128 x 64 takes all 255 registers and
        spills 12 bytes in 3.6, grad_q's with QK-norm 12 in 3.8; 128 x 32 take 186 and 182. Where D is no power of two
        masks take registers and loads are narrow: half the columns. float32 products are exact and run without tensor
        cores: at D = 128 backward spills 400 bytes with 32 x 16 tiles, none with 16 x 16 and eight warps, 404 again
        with four. gfx942 has float32 matrix instructions and 512 registers a lane: 64 x 32 tiles spill none at D = 128
        and take 6 to 8 times fewer instructions a score than 16 x 16; where D is no power of two they do spill.
        D = 128 on sm_100: 3.6 alone spills 24 bytes of grad_q's with QK-norm in float16, none in bfloat16.
        D = 64 on sm_100: where tiles leave tokens over, as at 1297, forward spills 8 bytes at 128 registers; with none
        it has 131 and half the programs a multiprocessor, or tiles of 32 keys and 38 % more instructions.
        """
        wide, whole = head_dim > 64, head_dim == triton.next_power_of_2(head_dim)
        if kernel == "delta":
            return cls(64, 0, 4, 1)
        if itemsize == 4 and not (target.is_amd and whole):
            return cls(16 if wide else 32, 16 if wide else 32, 8, 1)
        if target.is_amd:
            if kernel == "forward" and itemsize == 2:
                return cls(128, 64, 8 if wide else 4, 1)
            return cls(64 if wide else 128, 32, 4, 1)
        blackwell = target.name.startswith("sm_10")
        if kernel == "forward":  # D = 64 on sm_100: a third stage spills 4 bytes at 128 registers, two spill none
            return cls(128, 64 if whole else 32, 8, 2 if blackwell and not wide else 3)
        if target.name == "sm_80" and not (wide and whole):
            return cls(32 if wide and kernel == "grad_kv" else 64 if wide else 128, 32, 8, 2)
        return cls(128 if (blackwell and whole) or not wide else 64, 64 if whole else 32, 8, 2)


@functools.cache
def attention_launch(kernel: str, head_dim: int, dtype: torch.dtype, target: Target) -> AttentionLaunch:
    key = f"D={head_dim},bytes={dtype.itemsize}"
    return launch.choose(
        AttentionLaunch,
        f"attention_{kernel}",
        key,
        target,
        lambda: AttentionLaunch.rule(kernel, head_dim, dtype.itemsize, target),
    )
