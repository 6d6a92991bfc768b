"""What a benchmark file states: one piece of work, every way there is to do it, and how to tell a right result.

A `bench_NAME.py` has a function `works(setting)` that returns its pieces; `run.py` times them, `conftest.py` makes
pytest-benchmark cases of them.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from internvit.numerics import norm_failures, product_failures, relative_error
from internvit.ops.core.select import BACKENDS

FORWARD, BOTH = "forward", "forward+backward"
OURS = "internvit"


@dataclass(frozen=True)
class Setting:
    """Where and how large: `quick` takes small shapes and few rounds, and compiles nothing."""

    device: str = "cpu"
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)


class MissingPeerError(Exception):
    """A peer cannot run here; its message is the gap that the table names."""


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    Attributes:
        name: as the table prints it; ours start with "internvit".
        build: makes the callable that takes the work's inputs; raises MissingPeerError where the peer is not to be had.
        trains: False for ways that have no backward.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    trains: bool = True

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class Work:
    """One piece of work.

    Attributes:
        bench: the file's name without `bench_`; an op's name for ops.
        shape, dtype: as the table prints them.
        inputs: fresh random inputs on the device; `None`s stand for absent ones.
        variants: the ways to do it, ours first.
        judge: (result, inputs) -> what the result breaks of the numerics contract.
        judge_gradients: the same for the gradients of the inputs, in order, with the gradient that came in last.
        bytes, flops: the least that a forward must move and multiply, and of a forward and backward.
        sizes: numbers that plots are drawn over, such as tokens and batch.
    """

    bench: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple[Any, ...]]
    variants: tuple[Variant, ...]
    judge: Callable[[Any, tuple[Any, ...]], list[str]]
    judge_gradients: Callable[[Any, tuple[Any, ...], Any], list[str]] | None = None
    bytes: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.judge_gradients is None else (FORWARD, BOTH)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a function's result."""
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if isinstance(t, Tensor))


def leaves(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs as leaves of a graph."""
    return tuple(x.detach().clone().requires_grad_() if isinstance(x, Tensor) else x for x in inputs)


def gradients(function: Callable, inputs: tuple[Any, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of the inputs that are leaves, and of a module's parameters, through one forward and one backward."""
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if isinstance(function, nn.Module):
        wanted += [p for p in function.parameters() if p.requires_grad]
    return torch.autograd.grad(tensors(function(*inputs)), wanted, grads)


def double(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach().double() if isinstance(x, Tensor) else x for x in inputs)


def compiled(function: Callable) -> Callable[[], Callable]:
    """torch.compile of an eager chain, for one shape."""

    def build() -> Callable:
        torch.compiler.reset()
        return torch.compile(function, fullgraph=True, dynamic=False)

    return build


def vector(width: int, generator: torch.Generator, offset: float = 0.0) -> Tensor:
    """A parameter [C] as trained ones are: not all alike."""
    return offset + 0.3 * torch.randn(width, generator=generator)


def tokens_of(setting: Setting) -> tuple[tuple[str, int, int, int], ...]:
    """(norm, images, tokens, width) that row ops are timed at: the 300M's and the 6B's at 448 px."""
    if setting.quick:
        return ("layer_norm", 1, 257, 1024), ("rms_norm", 1, 257, 3200)
    if setting.device.startswith("cuda"):
        return tuple((n, b, 1025, c) for b in (1, 8, 64) for n, c in (("layer_norm", 1024), ("rms_norm", 3200)))
    return ("layer_norm", 8, 1025, 1024), ("rms_norm", 1, 1025, 3200)


def gemm_dtypes(setting: Setting, width: int) -> tuple[torch.dtype, ...]:
    """The dtypes GEMMs are timed in: on a CPU no float32 at the 6B's width, two minutes of fifteen on two cores."""
    if setting.device.startswith("cuda") or setting.quick or width < 3200:
        return setting.dtypes
    return tuple(dtype for dtype in setting.dtypes if dtype.itemsize < 4)


def needs(package: str, how: str) -> None:
    """Raises MissingPeerError unless `package` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingPeerError(f"{package} is not installed: {how}")


def _on(ours: Callable[..., Any], backend: str) -> Callable[[], Callable[..., Any]]:
    return lambda: lambda *inputs: ours(*inputs, backend=backend)


def op_work(
    setting: Setting,
    op: str,
    shape: str,
    dtype: torch.dtype,
    make: Callable[[], tuple[Any, ...]],
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    peers: Mapping[str, Callable[[], Callable]] | None = None,
    product: bool = False,
    magnitude: Callable[..., Tensor] | None = None,
    judge: Callable[[Any, tuple[Any, ...]], list[str]] | None = None,
    implemented_as: str | None = None,
    head_dim: int = 0,
    bytes: tuple[float, float] = (0.0, 0.0),
    flops: tuple[float, float] = (0.0, 0.0),
    sizes: Mapping[str, int] | None = None,
    compile_peer: bool = True,
    trains: bool = True,
) -> Work:
    """The work of one op: ours on every backend here, the eager formula, torch.compile of it, and other peers.

    Args:
        make: inputs on the CPU; moved to the device here.
        ours: takes the inputs and `backend=`.
        plain: the eager formula, which is the truth when given float64 inputs.
        product: judged as attention and GEMMs are, else as norms.
        implemented_as: the op that a backend must have, if another than `op`.
        magnitude: for norms, of float64 inputs: the sum of the absolute terms of the last output.
        judge: instead of `product` and `magnitude`, for ops with a rule of their own.
        bytes, flops: of a forward, and of a forward and backward.
    """
    names = [
        name
        for name, backend in BACKENDS.items()
        if name not in ("reference", "sdpa", "flash")  # the first is for truth, the others are peers
        and backend.missing() is None
        and backend.find(implemented_as or op) is not None
        and backend.rejects(setting.device, dtype, head_dim) is None
    ]
    names = names or ["auto"]  # no compiled backend has the op here: what a call without `backend=` takes
    variants = [Variant(f"{OURS} {name}", _on(ours, name)) for name in names]
    variants.append(Variant("eager", lambda: plain))
    if compile_peer and not setting.quick:
        variants.append(Variant("torch.compile", compiled(plain)))
    variants += [Variant(name, build) for name, build in (peers or {}).items()]

    def by_kind(result: Any, inputs: tuple[Any, ...]) -> list[str]:
        wide = double(inputs)
        failures = []
        outputs, truths, eagers = tensors(result), tensors(plain(*wide)), tensors(plain(*inputs))
        for i, (actual, truth, eager) in enumerate(zip(outputs, truths, eagers, strict=True)):
            if product:
                failures += product_failures(actual, truth, eager)
            else:
                last = i == len(truths) - 1
                terms = magnitude(*wide) if magnitude is not None and last else None
                failures += norm_failures(actual, truth, eager, terms)
        return failures

    def judge_gradients(grads: Any, inputs: tuple[Any, ...], incoming: Any) -> list[str]:
        wide = tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in double(inputs))
        truths = gradients(plain, wide, tuple(g.double() for g in incoming))
        eagers = gradients(plain, inputs, incoming)
        failures = []
        for i, (actual, truth, eager) in enumerate(zip(grads, truths, eagers, strict=True)):
            # The suite has the fine bounds; this one lets no wrong gradient through.
            allowed = max(2 * relative_error(eager, truth), torch.finfo(actual.dtype).eps)
            error = relative_error(actual, truth)
            if not error <= allowed:
                failures.append(f"gradient {i}: relative error {error:.2e}, allowed {allowed:.2e}")
        return failures

    def inputs() -> tuple[Any, ...]:
        return tuple(x.to(setting.device, dtype) if isinstance(x, Tensor) else x for x in make())

    return Work(
        op,
        shape,
        dtype,
        inputs,
        tuple(variants),
        judge or by_kind,
        judge_gradients if trains else None,
        dict(zip((FORWARD, BOTH), bytes, strict=True)),
        dict(zip((FORWARD, BOTH), flops, strict=True)),
        sizes or {},
    )
