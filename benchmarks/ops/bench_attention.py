"""Attention on the views of a packed qkv buffer, forward and backward, next to SDPA, its kernels and flash-attn."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, attention_cases, attention_sizes
from internvit.benchmarks.harness.peers import flash_attn, sdpa, sdpa_kernels


def cases(setting: Setting) -> list[BenchmarkCase]:
    peers = {"SDPA": lambda: sdpa, **sdpa_kernels(setting), **flash_attn(setting)}
    return attention_cases(setting, "attention", attention_sizes(setting), peers=peers)


def test_attention(timed) -> None:
    timed()
