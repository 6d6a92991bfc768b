"""Interleaved times: the one way a time is taken in this folder.

Every candidate runs once in each round, in turn, so that a busy minute of the machine hits all of them alike. Each call
takes the next of several sets of inputs, together larger than the last-level cache. What is reported is the ratio of
medians, with the spread.
"""

import contextlib
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOST_COPIES = 16
LEAST_SAMPLE = 2e-3
"""Seconds a sample lasts at least: short calls are repeated, so that the clock's 0.1 us does not show."""


@contextlib.contextmanager
def freed_pages_kept() -> Iterator[bool]:
    """Inside, glibc keeps what is freed, as the heap of a long-running process would; gives whether it could.

    As it comes, it maps tensors over 32 MiB anew at every call and gives the end of the heap back: then the system's
    zeroing of pages is timed, in every way alike. layer_scale_residual_norm, 8200x1024, float32, forward on two cores
    of an EPYC (Zen 5): 19.8 ms as it comes and 3.3 so; torch.compile 20.7 and 3.6.
    """
    most_mapped, trim_threshold = -4, -1  # malloc.h
    try:
        library = ctypes.CDLL(None)
        kept = bool(library.mallopt(most_mapped, 0) and library.mallopt(trim_threshold, 2**31 - 1))
    except (AttributeError, OSError):
        yield False
        return
    try:
        yield kept
    finally:
        library.mallopt(most_mapped, 65536)  # as it comes
        library.mallopt(trim_threshold, 2**26)  # as large as it grows by itself
        library.malloc_trim(0)


@dataclass(frozen=True)
class Times:
    """Seconds a call, one a round."""

    seconds: tuple[float, ...]

    def quantile(self, percent: int) -> float:
        if len(self.seconds) == 1:
            return self.seconds[0]
        return statistics.quantiles(self.seconds, n=100, method="inclusive")[percent - 1]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache that a device's calls share."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s and s[-1] in units), default=32 * 2**20)


def copies_past_cache(inputs: tuple[Any, ...], device: str) -> int:
    """How many sets of such inputs are twice the last-level cache, at most `MOST_COPIES`."""
    size = sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
    return max(2, min(MOST_COPIES, -(-2 * last_level_cache(device) // max(size, 1))))


def rotating(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> Callable[[], Any]:
    """A call without arguments that takes the next set each time."""
    turn = itertools.cycle(sets)
    return lambda: function(*next(turn))


def seconds_of(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds a call, over `repeats` of them; on a GPU between two events of the current stream."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def interleaved(
    candidates: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2, device: str = "cpu"
) -> Iterator[dict[str, Times]]:
    """The times so far, after each round: whoever stops early keeps what was measured."""
    repeats = {}
    for name, call in candidates.items():
        once = min(seconds_of(call, 1, device) for _ in range(warm_up))
        repeats[name] = max(1, round(LEAST_SAMPLE / max(once, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            seconds[name].append(seconds_of(call, repeats[name], device))
        yield {name: Times(tuple(found)) for name, found in seconds.items()}


def graphed(function: Callable[..., Any], sets: list[tuple[Any, ...]]) -> tuple[Callable[[], object], int]:
    """A CUDA graph that runs `function` once on every set, and how many calls that is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets:
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            function(*inputs)
    return graph.replay, len(sets)


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Memory that a call holds at its peak over what was held before; None where the system does not say.

    On a GPU the allocator's peak; on Linux the growth of the process's resident set, kernels' scratch included.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that is kept after being freed would hide the call's own
        reset.write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024
