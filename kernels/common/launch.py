"""Starts kernels on the tensors' device and current stream, or hands their launches to a tool."""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from internvit.kernels.common import compiled
from internvit.kernels.common.target import INTERPRETER, Target, target_of_device

logger = logging.getLogger("internvit")


@dataclass(frozen=True)
class Launch:
    """One kernel start."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Interception:
    """Stands in for a device of `target`: launches are passed to `receive` instead of run."""

    target: Target
    receive: Callable[[Launch], None]


_interception: ContextVar[Interception | None] = ContextVar("internvit_interception", default=None)


@contextlib.contextmanager
def intercept(target: Target, receive: Callable[[Launch], None]) -> Iterator[None]:
    """Inside, no kernel runs: `receive` is called with each launch that `target` would have got, in this thread.

    Tensors may be on any device, `meta` too.
    """
    token = _interception.set(Interception(target, receive))
    try:
        yield
    finally:
        _interception.reset(token)


@contextlib.contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Inside, no kernel runs; the launches that `target` would have got are appended to the list."""
    launches: list[Launch] = []
    with intercept(target, launches.append):
        yield launches


def target_of(x: Tensor) -> Target:
    interception = _interception.get()
    if interception is not None:
        return interception.target
    return target_of_device(x.device.index or 0) if x.is_cuda else INTERPRETER


def run(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constants: Any) -> None:
    """Starts `kernel` on the device and current stream of its tensors; an empty grid starts nothing."""
    if 0 in grid:
        return
    interception = _interception.get()
    if interception is not None:
        interception.receive(Launch(kernel, grid, args, constants, num_warps, num_stages))
        return
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        compiled.start(kernel, grid, args, constants, num_warps, num_stages)


@triton.jit
def probe_kernel(p_out):
    tl.store(p_out, 1.0)


@functools.cache
def failure_to_start() -> str | None:
    """Why no kernel starts on the current GPU, as where no C compiler is found; None where one does.

    A small kernel is compiled and started once in a process; a failure is logged once.
    """
    try:
        with _disable_current_modes():
            out = torch.zeros(1, device="cuda")
            probe_kernel[(1,)](out)
            started = out.item() == 1.0
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        why = f"Triton starts no kernel here: {type(error).__name__}: {lines[0]}"
    else:
        if started:
            return None
        why = "Triton's kernels do not write what they should here"
    logger.warning("Triton is not used: %s", why)
    return why
