"""Attention on the views of a packed qkv buffer, forward and backward, next to SDPA, its kernels and flash-attn.

On a GPU also at 1024 tokens in float16 with heads that lie one after the other, forward: the shape of published
figures, and what Triton's tutorial takes.
"""

import dataclasses

import torch
from torch import Tensor

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, attention_cases, attention_sizes
from internvit.benchmarks.harness.peers import flash_attn, sdpa, sdpa_kernels, triton_tutorial
from internvit.ops.core.spec import Size


def _heads_apart(case: BenchmarkCase) -> BenchmarkCase:
    """The same work on q, k, v [B, N, H, D] that lie as [B, H, N, D]."""

    def inputs() -> tuple[Tensor, ...]:
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in case.inputs())

    return dataclasses.replace(case, inputs=inputs, shape=f"{case.shape}, heads apart", gradient_violations=None)


def cases(setting: Setting) -> list[BenchmarkCase]:
    peers = {"SDPA": lambda: sdpa, **sdpa_kernels(setting), **flash_attn(setting)}
    found = attention_cases(setting, "attention", attention_sizes(setting), peers=peers)
    if setting.device.startswith("cuda") and not setting.quick:
        half = dataclasses.replace(setting, dtypes=(torch.float16,))
        sizes = [Size(8, 1024, 16, 64), Size(8, 1024, 16, 128)]
        published = attention_cases(half, "attention", sizes, peers={**peers, **triton_tutorial(setting)})
        found += [_heads_apart(case) for case in published]
    return found


def test_attention(timed) -> None:
    timed()
