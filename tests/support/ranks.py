"""Functions run by several processes that talk by gloo, and the bytes that they send each other."""

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CONTEXT = multiprocessing.get_context("forkserver")  # a fork of a process that has used torch's threads hangs
CONTEXT.set_forkserver_preload(  # what every rank would import for seconds
    ["internvit.parallel", "tests.support.models", "torch._dynamo", "internvit.benchmarks.reports.memory_passes"]
)


thorough = pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
"""Of a test that has a small version for each change, and all cases as a slow one."""


def run_ranks(count: int, function: Callable, *args: Any) -> list[Any]:
    """What `function(*args)` returns on each of `count` ranks, which have a process group of gloo."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            CONTEXT.Process(target=_run, args=(rank, count, folder, function, args), daemon=True)
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        paths = [Path(folder) / f"{rank}.pickle" for rank in range(count)]
        results = []
        try:
            for rank, path in _finished(paths, processes):
                if not path.exists():
                    raise AssertionError(f"rank {rank} of {count} left nothing; exit code {processes[rank].exitcode}")
                result, error = pickle.loads(path.read_bytes())
                if error is not None:
                    raise AssertionError(f"rank {rank} of {count}: {error}")
                results.append((rank, result))
        finally:
            for process in processes:  # after an error the others wait for a rank that is gone
                process.kill()
                process.join()
    return [result for _, result in sorted(results, key=lambda r: r[0])]


def _finished(paths: list[Path], processes: list[Any], seconds: float = 600) -> Iterator[tuple[int, Path]]:
    """The ranks in the order in which they end, or all that are left once the time is over."""
    waiting = dict(enumerate(paths))
    end = time.monotonic() + seconds
    while waiting:
        for rank, path in list(waiting.items()):
            if path.exists() or not processes[rank].is_alive() or time.monotonic() > end:
                yield rank, waiting.pop(rank)
        time.sleep(0.02)


def _run(rank: int, count: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    # Fills torch.empty with NaN, as tests/conftest.py; use_deterministic_algorithms would import torch._inductor first.
    torch._C._set_deterministic_algorithms(True)
    os.environ.setdefault(
        "GLOO_SOCKET_IFNAME", "lo"
    )  # or gloo looks the host name up, for seconds where there is no DNS
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, rank=rank, world_size=count, timeout=timedelta(seconds=120))
    result, error = None, None
    try:
        result = function(*args)
    except BaseException:
        error = traceback.format_exc()
    (Path(folder) / f"{rank}.writing").write_bytes(pickle.dumps((result, error)))
    (Path(folder) / f"{rank}.writing").rename(Path(folder) / f"{rank}.pickle")
    if error is None:
        dist.destroy_process_group()


class CollectiveBytes(TorchDispatchMode):
    """Counts the calls of each collective, and the bytes of the larger of what it is given and what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__.strip("_")
            if name != "wait_tensor":
                self.calls[name] += 1
                self.bytes[name] += max(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))
