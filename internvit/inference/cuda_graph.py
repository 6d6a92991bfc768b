"""CUDA graphs by input shape: a function's kernels are recorded once, and each later call starts them all at once.

At batch 1 a block is some nine launches of a few microseconds each, and the host cannot keep up with a fast GPU.
Unmeasured: no GPU has run this yet.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from internvit.model.hooks import has_global_hooks, has_own_hooks

Tensors = tuple[Tensor, ...]

LIMIT = 8
WARM_UPS = 2
"""Runs before capture: the first compiles kernels and lets cuBLAS allocate, which a capture may not."""


class _Captured:
    """One graph with the memory it reads its input of `shape` from and writes its outputs to."""

    def __init__(self, run: Callable[[Tensor], Tensors], x: Tensor, shape: tuple[int, ...], pool: Any) -> None:
        # An inference tensor could not be written to outside inference mode later; weights that autocast has cast and
        # cached are freed when it ends, under a graph that still reads them.
        kind = x.device.type
        autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(kind, dtype, autocast, cache_enabled=False),
            torch.cuda.device(x.device),
        ):
            self.input = torch.zeros(shape, dtype=x.dtype, device=x.device)
            self._fill(x)
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run(self.input)
            current.wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            # In mode "global" a call of any thread that may not be captured ends the capture, as pin_memory's of a
            # DataLoader: cudaHostAlloc.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                self.outputs = run(self.input)

    def _fill(self, x: Tensor) -> None:
        """Copies x to the start of the input; what lies behind it, zeros or an earlier call's images, is not read."""
        (self.input if x.shape == self.input.shape else self.input[: x.shape[0]]).copy_(x)

    def __call__(self, x: Tensor) -> Tensors:
        with torch.cuda.device(x.device):
            self._fill(x)
            self.graph.replay()
            # The graph's own outputs are overwritten by its next replay.
            if x.shape == self.input.shape:
                return tuple(t.clone() for t in self.outputs)
            return tuple(t[: x.shape[0]].clone() for t in self.outputs)


class GraphedFunction:
    """`run(x) -> tensors` by CUDA graphs, one for each shape, dtype and device of x, autocast and `variant`.

    With `batches` an input whose first dimension is none of them is padded to the next larger one, and outputs are cut
    to it; `run` must treat images apart. A batch larger than all of them has a graph of its own.

    The first call of a kind runs `run` twice on a side stream and captures it; later ones copy x into the graph's
    input, replay, and return copies of its outputs. `run` may do nothing but launch kernels: Python in it runs at
    capture only. Threads take turns. Calls must not overlap on several streams: they share the graph's memory.

    Args:
        limit: how many graphs are kept; the one unused for longest is freed for a new one.
        batches: the batch sizes that graphs are made for; all, if none are given.

    Raises:
        ValueError: a limit or batch size below 1.
    """

    def __init__(self, limit: int = LIMIT, batches: Sequence[int] = ()) -> None:
        for name, numbers in (("limit", [limit]), ("batches", batches)):
            if any(type(n) is not int or n < 1 for n in numbers):
                got = limit if name == "limit" else tuple(batches)
                raise ValueError(f"cuda_graph: {name} must be whole numbers of at least 1, got {got!r}")
        self.limit = limit
        self.batches = tuple(sorted(set(batches)))
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool: Any = None
        self._lock = Lock()

    def __call__(self, run: Callable[[Tensor], Tensors], x: Tensor, variant: Hashable = None) -> Tensors:
        with self._lock:
            return self._replay(run, x, variant)

    def _replay(self, run: Callable[[Tensor], Tensors], x: Tensor, variant: Hashable) -> Tensors:
        kind = x.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shape = tuple(x.shape)
        if self.batches:
            shape = next((b for b in self.batches if b >= shape[0]), shape[0]), *shape[1:]
        key = (shape, x.dtype, x.device, autocast, variant)
        if key not in self._graphs:
            if len(self._graphs) >= self.limit:
                self._graphs.popitem(last=False)[1].graph.reset()
            # Graphs share one pool: none runs beside another, and outputs stay alive, so nothing is overwritten.
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Captured(run, x, shape, self._pool)
        self._graphs.move_to_end(key)
        return self._graphs[key](x)

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Frees every graph and its memory."""
        with self._lock:
            for captured in self._graphs.values():
                captured.graph.reset()
            self._graphs.clear()
            self._pool = None


class CaptureGuard:
    """Whether a capture of `module` still stands for calling it: its graph reads weights where they lay, and no Python.

    Holds the modules inside, which have no hooks then, their settings, and the addresses of their parameters. A check
    is one pass over lists made here: 0.13 ms for the 218 modules of the 300M's encoder, one EPYC core.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parents = [(parent._modules, dict(parent._modules)) for parent in module.modules()]
        self._modules = [(child, _settings(child)) for child in module.modules()]
        self._parameters = [(child._parameters, name) for child in module.modules() for name in child._parameters]
        self._addresses = self._read_addresses()

    def _read_addresses(self) -> list[int]:
        return [0 if (p := parameters[name]) is None else p.data_ptr() for parameters, name in self._parameters]

    def holds(self) -> bool:
        """Whether modules, hooks, settings and addresses are those of the capture."""
        if has_global_hooks():
            return False
        if any(has_own_hooks(child) or _settings(child) != settings for child, settings in self._modules):
            return False
        if any(children != captured for children, captured in self._parents):
            return False
        return self._read_addresses() == self._addresses


def _settings(module: nn.Module) -> tuple:
    own = module.__dict__
    return type(module), module.training, own.get("eps"), own.get("rounding"), own.get("num_heads")
