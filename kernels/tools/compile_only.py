"""Runs models for a GPU that is not there: their kernel launches are specialised by Triton's JIT, nothing is computed.

Two stand-ins make that possible without a device. A Triton driver that answers the device's properties lets the JIT
specialise each launch on None, 1, divisibility by 16 and alignment as it would on the GPU. A dispatch mode gives every
torch op on CPU tensors an output of the right shape whose memory is never touched, so that the published models run at
their native sizes in milliseconds.
"""

import contextlib
import importlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from internvit.kernels.common import compiled, launch
from internvit.kernels.common.launch import Launch
from internvit.kernels.common.target import Target

_device_numbers = itertools.count(1000)  # the JIT caches the target of each device number


def gpu_target(target: Target) -> GPUTarget:
    if target.is_amd:
        return GPUTarget("hip", target.name, target.warp_size)
    return GPUTarget("cuda", target.compute_capability, target.warp_size)


def reason(error: BaseException) -> str:
    """Why a kernel does not compile, in a line. Triton's errors quote each caller; the first cause tells."""
    first = error
    while (cause := first.__cause__ or first.__context__) is not None:
        first = cause
    lines = [line.strip() for line in str(first).splitlines() if line.strip(" ^")] or [""]
    kind = "" if first is error else f"{type(first).__name__}: "
    return f"{type(error).__name__}: {kind}{lines[-1]}"


class CompileOnlyDriver:
    """A `triton.runtime.driver` of a device that cannot run anything."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.number = next(_device_numbers)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return gpu_target(self.target)


@dataclass(frozen=True)
class Specialization:
    """What the JIT compiles a kernel from, as plain data: another program can compile the same.

    Attributes:
        signature: type of each argument by name, "constexpr" for constants.
        constants: value of each constant by name.
        attributes: of the arguments by position, as [["tt.divisibility", 16]].
        options: the target's own, beside warps and stages.
    """

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    attributes: tuple[tuple[int, tuple[tuple[str, Any], ...]], ...]
    num_warps: int
    num_stages: int
    options: tuple[tuple[str, Any], ...] = ()

    def compile(self, target: Target) -> Any:
        kernel = getattr(importlib.import_module(self.module), self.function)
        return triton.compile(
            ASTSource(
                kernel,
                dict(self.signature),
                {(kernel.arg_names.index(name),): value for name, value in self.constants},
                {(i,): [list(attribute) for attribute in attributes] for i, attributes in self.attributes},
            ),
            target=gpu_target(target),
            options=compiled.options(self.num_warps, self.num_stages) | dict(self.options),
        )


def specialize(one: Launch) -> Specialization:
    """`one` as the JIT of the active driver specialises it; it is neither compiled nor started."""
    seen: list[dict[str, Any]] = []

    def keep(*, compile: dict[str, Any], **_: Any) -> bool:
        seen.append(compile)
        return True  # as if it were compiled already

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = keep
        options = compiled.options(one.num_warps, one.num_stages)
        one.kernel.run(*one.args, grid=one.grid, warmup=True, **options, **one.constants)
    (request,) = seen
    names, attributes = one.kernel.arg_names, request["configs"][0]
    return Specialization(
        one.kernel.fn.__module__,
        one.kernel.fn.__name__,
        tuple(request["signature"].items()),
        tuple((names[path[0]], value) for path, value in request["constants"].items()),
        tuple((path[0], tuple(map(tuple, found))) for path, found in attributes.items() if found),
        one.num_warps,
        one.num_stages,
        tuple((name, value) for name, value in one.constants.items() if name not in names),
    )


class WithoutComputing(TorchDispatchMode):
    """Torch ops on CPU tensors return uninitialised memory of the right shape; views are real, in-place ops do nothing.
    Asked for a value, they answer 0: so no weight leaves float16's range when LayerScale is folded into it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "internvit":
            kernel = torch.library.get_kernel(func, "CPU")
            with self:  # the op's own torch calls come here too
                return kernel.call_boxed(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        schema = func._schema
        if schema.is_mutable:
            return args[0]
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        if not tensors or func.is_view or any(r.alias_info is not None for r in schema.returns):
            return func(*args, **kwargs)
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            return 0.0 if tensors[0].is_floating_point() else False
        if func is torch.ops.aten.equal.default:
            return True
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        args, kwargs = tree_map(_on("meta"), (args, kwargs))
        return tree_map(_on("cpu"), func(*args, **kwargs))


def _on(device: str) -> Callable[[Any], Any]:
    """A function that gives a tensor's layout uninitialised memory on `device`, and leaves everything else alone."""

    def place(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

    return place


def _import_kernels() -> None:
    """Kernels read TRITON_INTERPRET when they are imported: before it is set they are compiled ones."""
    folder = Path(launch.__file__).resolve().parents[1]
    for path in sorted(folder.rglob("*.py")):
        if "tools" not in path.parts:
            importlib.import_module(".".join(["internvit.kernels", *path.relative_to(folder).with_suffix("").parts]))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def intercepting(target: Target, receive: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, no kernel runs and the JIT sees a device of `target`: `receive` gets each launch; tensors are on the CPU.

    Raises:
        RuntimeError: in Triton's interpreter, which has no JIT.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("intercepting: unset TRITON_INTERPRET: interpreted kernels are never compiled")
    before = driver._active
    driver.set_active(CompileOnlyDriver(target))
    try:
        with launch.intercept(target, receive):
            yield
    finally:
        driver._active = before


@contextlib.contextmanager
def specializing(target: Target, receive: Callable[[Launch, Specialization], None]) -> Iterator[None]:
    """As `intercepting`; `receive` gets each launch specialised as for `target` too."""
    with intercepting(target, lambda one: receive(one, specialize(one))):
        yield


@contextlib.contextmanager
def _linears_of_a_gpu() -> Iterator[None]:
    """Inside, Linears take CPU tensors as they are: a CPU without bfloat16 products would widen them to float32 first,
    and the launches of a static profile there took 60 s of CPU time and not 19."""
    import internvit

    linear: Any = internvit.ops.linear
    before = linear.cpu_multiplies
    linear.cpu_multiplies = lambda dtype: True
    try:
        yield
    finally:
        linear.cpu_multiplies = before


@contextlib.contextmanager
def triton_takes_cpu_tensors() -> Iterator[None]:
    """Inside, backend `triton` takes CPU tensors, with compiled kernels, which have to be intercepted.

    The choice of backends is remembered by the process: use one of its own.
    """
    _import_kernels()
    with _environment("TRITON_INTERPRET", "1"), _linears_of_a_gpu():
        yield


def compile_and_look_up(one: Launch) -> None:
    """All that the JIT does for a launch but to start the kernel."""
    compiled.start(one.kernel, one.grid, one.args, one.constants, one.num_warps, one.num_stages, warmup=True)


@contextlib.contextmanager
def compile_only(target: Target, receive: Callable[[Launch, Specialization], None]) -> Iterator[None]:
    """Inside, models on the CPU run on backend `triton` as on `target`, and nothing is computed; see `specializing`.

    Use a process of its own, as for `triton_takes_cpu_tensors`.
    """
    import internvit

    with (
        specializing(target, receive),
        triton_takes_cpu_tensors(),
        internvit.backend("triton"),
        WithoutComputing(),
    ):
        yield
