"""Tiles, warps and stages of the attention kernels, by head dimension, dtype and target."""

import functools
from dataclasses import dataclass

import torch
import triton

from internvit.kernels import launch
from internvit.kernels.launch import Target


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

    @classmethod
    def rule(cls, kernel: str, block_d: int, itemsize: int, target: Target) -> "AttentionLaunch":
        if itemsize == 4:  # exact float32 products: no tensor cores, registers set the size
            return cls(32, 32, 4, 1)
        if kernel == "forward":
            return cls(128, 64, 8 if block_d > 64 else 4, 3)
        return cls(64, 64, 4, 2)


@functools.cache
def attention_launch(kernel: str, head_dim: int, dtype: torch.dtype, target: Target) -> AttentionLaunch:
    block_d = max(16, triton.next_power_of_2(head_dim))
    key = f"D={head_dim},bytes={dtype.itemsize}"
    return launch.choose(
        AttentionLaunch,
        f"attention_{kernel}",
        key,
        target,
        lambda: AttentionLaunch.rule(kernel, block_d, dtype.itemsize, target),
    )
