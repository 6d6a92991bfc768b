"""Benchmark cases: inputs, the implementations that are timed on them, and the check of a result before it is timed.

A `bench_NAME.py` has a function `cases(setting)`; `run.py` times what it returns, `conftest.py` makes pytest-benchmark
cases of it. An op's cases follow from its `OpSpec`.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvit.numerics import relative_error
from internvit.ops.backends.registry import backends_for
from internvit.ops.core.spec import Inputs, OpSpec, Size, cost, every_spec

FORWARD, BOTH = "forward", "forward+backward"
OURS = "internvit"


@dataclass(frozen=True)
class Setting:
    """Where and how large: `quick` takes small shapes and few rounds, and compiles nothing.

    Attributes:
        triton_tutorial: the file 06-fused-attention.py of Triton's tutorials, which its wheel does not have.
    """

    device: str = "cpu"
    quick: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    triton_tutorial: Path | None = None

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)


class MissingPeerError(Exception):
    """A peer cannot run here; its message is the gap that the table names."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of what a case computes.

    Attributes:
        name: as the table prints it; ours start with "internvit".
        build: makes the callable that takes the case's inputs; raises MissingPeerError where the peer is not to be had.
        trains: False for those that have no backward.
        compiles: torch.compile's, whose building takes as long as timing many others.
        most_error: of lower precision: the relative error up to which a result of ours is timed, instead of the case's
            numerics contract.
    """

    name: str
    build: Callable[[], Callable[..., Any]]
    trains: bool = True
    compiles: bool = False
    most_error: float | None = None

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class BenchmarkCase:
    """One computation at one size and dtype.

    Attributes:
        bench: the file's name without `bench_`; an op's name for ops.
        shape, dtype: as the table prints them.
        inputs: fresh random inputs on the device; `None`s stand for absent ones.
        implementations: ours first.
        violations: (result, inputs) -> what the result breaks of the numerics contract.
        gradient_violations: the same for the gradients of the inputs, in order, with the gradient that came in last.
        bytes, flops: the least that a forward must move and multiply, and of a forward and backward.
        sizes: numbers that plots are drawn over, such as tokens and batch.
        error: (result, inputs) -> the relative error to float32, which the table prints beside each forward's time.
    """

    bench: str
    shape: str
    dtype: torch.dtype
    inputs: Callable[[], tuple[Any, ...]]
    implementations: tuple[Implementation, ...]
    violations: Callable[[Any, tuple[Any, ...]], list[str]]
    gradient_violations: Callable[[Any, tuple[Any, ...], Any], list[str]] | None = None
    bytes: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    error: Callable[[Any, tuple[Any, ...]], float] | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        return (FORWARD,) if self.gradient_violations is None else (FORWARD, BOTH)

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


def row_sizes(setting: Setting, norm: str | None = None) -> list[tuple[str, Size]]:
    """(norm, size) that row ops are timed at: the 300M's LayerNorm and the 6B's RMSNorm at 448 px."""
    batches: dict[str, tuple[int, ...]] = {"layer_norm": (8,), "rms_norm": (1,)}
    if setting.quick:
        batches = dict.fromkeys(batches, (1,))
    elif setting.device.startswith("cuda"):
        batches = dict.fromkeys(batches, (1, 8, 64))
    tokens, heads = 257 if setting.quick else 1025, {"layer_norm": (16, 64), "rms_norm": (25, 128)}
    names = [norm] if norm else list(batches)
    return [(name, Size(batch, tokens, *heads[name])) for name in names for batch in batches[name]]


def gemm_sizes(setting: Setting) -> list[tuple[Size, torch.dtype]]:
    """Sizes and dtypes that GEMMs are timed at: on a CPU one image, and no float32 at the 6B's width.

    That takes two minutes of fifteen on two cores.
    """
    if setting.device.startswith("cuda"):
        return [(size, dtype) for _, size in row_sizes(setting) for dtype in setting.dtypes]
    sizes = [dataclasses.replace(size, batch=1) for _, size in row_sizes(setting)]
    return [
        (size, dtype)
        for size in sizes
        for dtype in setting.dtypes
        if setting.quick or size.hidden_size < 3200 or dtype.itemsize < 4
    ]


def attention_sizes(setting: Setting, heads: tuple[int, int] | None = None) -> list[Size]:
    """The 300M's and the 6B's attention at 448 px; without `heads` also with fewer and more tokens."""
    both = ((16, 64), (25, 128))
    if setting.quick:
        return [Size(1, 257, *(heads or both[0]))]
    if setting.device.startswith("cuda"):
        grid = ((1, 1025), (8, 1025)) if heads else ((1, 1025), (8, 1025), (8, 257), (1, 4097))
        return [Size(*batch_tokens, *h) for batch_tokens in grid for h in ((heads,) if heads else both)]
    if heads:
        return [Size(1, 1025, *heads)]
    more = [Size(1, 1025, 16, 64), Size(4, 1025, 16, 64), Size(1, 257, 16, 64), Size(1, 4097, 16, 64)]
    return [*more, Size(1, 1025, 25, 128)]


def needs(package: str, how: str) -> None:
    """Raises MissingPeerError unless `package` can be imported."""
    if importlib.util.find_spec(package) is None:
        raise MissingPeerError(f"{package} is not installed: {how}")


class ForwardOnly(functools.partial):
    """What builds a peer that has no backward."""


Peers = Mapping[str, Callable[[], Callable]]


class _OpCase:
    """The functions of one op's case, on the example's arguments in order."""

    def __init__(self, setting: Setting, spec: OpSpec, size: Size, dtype: torch.dtype, variant: str) -> None:
        self.spec, self.make = spec, spec.examples[variant]
        self.random = Inputs(size, setting.generator(), dtype, setting.device, row_scale=False)
        self.names = list(self.make(dataclasses.replace(self.random, device="meta")))

    def inputs(self) -> tuple[Any, ...]:
        return tuple(self.make(self.random).values())

    def named(self, inputs: tuple[Any, ...]) -> dict[str, Any]:
        return dict(zip(self.names, inputs, strict=True))

    def ours(self, backend: str) -> Callable[[], Callable[..., Any]]:
        return lambda: lambda *inputs: self.spec.function(**self.named(inputs), backend=backend)

    def plain(self, *inputs: Any) -> Any:
        return self.spec.formula(**self.named(inputs))

    def violations(self, result: Any, inputs: tuple[Any, ...]) -> list[str]:
        given = self.named(inputs)
        return self.spec.violations(given, tensors(result), self.spec.truth(given), self.spec.plain(given))

    def gradient_violations(self, grads: Any, inputs: tuple[Any, ...], incoming: Any) -> list[str]:
        wide = tuple(x.requires_grad_() if isinstance(x, Tensor) else x for x in double(inputs))
        truths = gradients(self.plain, wide, tuple(g.double() for g in incoming))
        eagers = gradients(self.plain, inputs, incoming)
        violations = []
        for i, (actual, truth, eager) in enumerate(zip(grads, truths, eagers, strict=True)):
            # The suite has the fine bounds; this one lets no wrong gradient through.
            allowed = max(2 * relative_error(eager, truth), torch.finfo(actual.dtype).eps)
            error = relative_error(actual, truth)
            if not error <= allowed:
                violations.append(f"gradient {i}: relative error {error:.2e}, allowed {allowed:.2e}")
        return violations


def op_case(
    setting: Setting,
    name: str,
    size: Size,
    dtype: torch.dtype,
    variant: str = "",
    bench: str = "",
    shape: str = "",
    peers: Peers | None = None,
    compile_peer: bool = True,
    trains: bool = True,
) -> BenchmarkCase:
    """The case of the op `name`: ours on every backend here, its plain formula, torch.compile of it, other peers.

    Args:
        variant: of the spec's examples.
        bench, shape: as the table prints them; the op's name, and rows x channels, by default.
        peers: take the example's arguments in order.
    """
    spec = every_spec()[name]
    case = _OpCase(setting, spec, size, dtype, variant)
    available = backends_for(spec.implemented_as, setting.device.partition(":")[0], dtype, size.head_dim)
    # The reference is the truth, sdpa and flash are peers; with no other, what a call without `backend=` takes.
    backends = [b for b in available if b not in ("reference", "sdpa", "flash")] or ["auto"]
    implementations = [Implementation(f"{OURS} {b}", case.ours(b)) for b in backends]
    implementations.append(Implementation("eager", lambda: case.plain))
    if compile_peer and not setting.quick:
        implementations.append(Implementation("torch.compile", compiled(case.plain), compiles=True))
    for peer, build in (peers or {}).items():
        implementations.append(Implementation(peer, build, trains=not isinstance(build, ForwardOnly)))
    least = cost(spec, size, dtype, variant)
    return BenchmarkCase(
        bench or name,
        shape or f"{size.batch * size.tokens}x{size.hidden_size}",
        dtype,
        case.inputs,
        tuple(implementations),
        case.violations,
        case.gradient_violations if trains and spec.trains else None,
        {FORWARD: least.forward_bytes, BOTH: least.both_bytes},
        {FORWARD: least.forward_flops, BOTH: least.both_flops},
    )


def row_cases(setting: Setting, name: str, norm: str | None = None, peers: Peers | None = None) -> list[BenchmarkCase]:
    """`op_case` of a row op at each size, in each dtype; one that fuses a norm has that of the size's model."""
    cases = []
    for model_norm, size in row_sizes(setting, norm):
        variant = model_norm if model_norm in every_spec()[name].examples else ""
        shape = f"{size.batch * size.tokens}x{size.hidden_size} {variant}".rstrip()
        cases += [op_case(setting, name, size, dtype, variant, shape=shape, peers=peers) for dtype in setting.dtypes]
    return cases


def quantized_linear_cases(setting: Setting, name: str) -> list[BenchmarkCase]:
    """`op_case` of a Linear of int8 or float8 operands with a bfloat16 output, at each size of GEMMs."""
    sizes = dict.fromkeys(size for size, _ in gemm_sizes(setting))
    return [op_case(setting, name, size, torch.bfloat16) for size in sizes]


def attention_cases(
    setting: Setting, name: str, sizes: list[Size], bench: str = "", peers: Peers | None = None
) -> list[BenchmarkCase]:
    """`op_case` of an op on heads; over 1025 tokens forward alone, in the first dtype."""
    cases = []
    for size in sizes:
        whole = size.tokens <= 1025
        numbers = {"batch": size.batch, "tokens": size.tokens, "heads": size.heads, "head_dim": size.head_dim}
        shape = "x".join(map(str, numbers.values()))
        for dtype in setting.dtypes if whole else setting.dtypes[:1]:
            case = op_case(setting, name, size, dtype, "", bench, shape, peers, compile_peer=False, trains=whole)
            cases.append(dataclasses.replace(case, sizes=numbers))
    return cases
