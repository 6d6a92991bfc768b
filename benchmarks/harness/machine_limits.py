"""What this machine can do, measured in the same run: copy bandwidth and GEMM rates. Times are shares of these."""

import statistics
import time
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from internvit.benchmarks.harness.timing import last_level_cache, seconds_of
from internvit.ops.backends import native
from internvit.ops.linear import cpu_multiplies


def bfloat16_products(device: str) -> bool:
    """Whether the device multiplies bfloat16; where a CPU emulates it, peers are timed in float32."""
    return device != "cpu" or cpu_multiplies(torch.bfloat16)


GEMMS = {"qkv": (1024, 3072), "proj": (1024, 1024), "fc1": (1024, 4096), "fc2": (4096, 1024)}
"""InternViT-300M's four Linears, in -> out."""


@dataclass(frozen=True)
class Limits:
    """Attributes:
    bandwidth: bytes a second that a copy past the last-level cache reads and writes.
    gemm: flops a second of the fastest shape tried, by dtype.
    shapes: flops a second of each of the block's Linears at 1025 tokens, by "dtype name".
    peak: flops a second of the CPU library's inner loop over operands in L1 or in tiles, all threads, by dtype; empty
        on a GPU and without the library.
    """

    bandwidth: float
    gemm: dict[str, float]
    shapes: dict[str, float]
    peak: dict[str, float] = field(default_factory=dict)

    def seconds(self, bytes_moved: float, flops: float, dtype: str) -> tuple[float, str]:
        """The least time of a piece of work on this machine, and which of the two limits sets it."""
        moving, multiplying = bytes_moved / self.bandwidth, flops / self.gemm[dtype] if dtype in self.gemm else 0.0
        return (multiplying, "gemm") if multiplying > moving else (moving, "copy")


def _median(call, device: str, rounds: int) -> float:
    seconds_of(call, 1, device)
    return statistics.median(seconds_of(call, 1, device) for _ in range(rounds))


def measure_peak(dtypes: tuple[torch.dtype, ...], rounds: int) -> dict[str, float]:
    """The best of `rounds` samples of a few milliseconds: a limit is what was reached once."""
    if native.unavailable_reason("internvit_cpu") is not None:
        return {}
    threads, found = torch.get_num_threads(), {}
    for dtype in dtypes:
        best = 0.0
        for _ in range(rounds):
            begin = time.perf_counter()
            flops = torch.ops.internvit_cpu.peak(dtype, 20_000, threads)
            best = max(best, flops / (time.perf_counter() - begin))
        found[str(dtype).removeprefix("torch.")] = best
    return found


def measure(device: str, dtypes: tuple[torch.dtype, ...], quick: bool) -> Limits:
    """Copies of four last-level caches' size; Linears of the block at 1025 tokens and one square GEMM."""
    rounds, tokens = (3, 257) if quick else (9, 1025)
    elements = max(4 * last_level_cache(device), 2**26) // 4
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device, rounds)
    best, shapes = {}, {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.bfloat16 and not bfloat16_products(device):
            dtype = torch.float32  # products that are exact there
        square = 1024 if quick else 8192 if device.startswith("cuda") else 2048
        for label, (rows, inner, out) in {
            **{label: (tokens, *sizes) for label, sizes in GEMMS.items()},
            "square": (square, square, square),
        }.items():
            x = torch.randn(rows, inner, device=device).to(dtype)
            weight = torch.randn(out, inner, device=device).to(dtype)
            seconds = _median(lambda x=x, w=weight: F.linear(x, w), device, rounds)
            shapes[f"{name} {label} {rows}x{inner}x{out}"] = 2.0 * rows * inner * out / seconds
        best[name] = max(rate for label, rate in shapes.items() if label.startswith(f"{name} "))
    peak = measure_peak(dtypes, rounds) if device == "cpu" else {}
    return Limits(8.0 * elements / copy, best, shapes, peak)
