"""What happens where a backend's kernel cannot be compiled or started, as Triton's without a C compiler.

A backend that was asked for by name raises `KernelStartError` with the cause chained. Under `auto` the next backend
runs the call, with one log line for each op and backend, and keeps the calls of the op with the same device, dtype,
head dimension and channels. Backward falls back by itself, to a backend that takes what forward saved; forward stays
where it is. A graph of torch.compile keeps the backends chosen when it was traced and raises the error.

Other errors are raised as they are: wrong arguments, no memory, and what leaves a device unusable, as an illegal
memory access.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from internvit.ops.backends.registry import BACKENDS
from internvit.ops.core.tuned import tuned_backend

logger = logging.getLogger("internvit")

# Triton before cuda: it folds QK-norm into attention, and q_hat and k_hat need no memory. No GPU has timed the two yet.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "sdpa", "reference"),
    "cuda": ("triton", "cuda", "sdpa", "reference"),
}
_AUTO_ORDER_ELSEWHERE = ("sdpa", "reference")

_COMPILES = ("triton.compiler", "triton.backends", "triton.runtime.build", "triton.runtime.driver")
"""The modules through which Triton's errors come while it looks for a device, compiles and loads."""
_DEVICE_ERRORS = ("Triton Error [", "CUDA error", "HIP error")
_NOT_STARTED = (
    "no kernel image",
    "invalid device function",
    "kernel image is invalid",
    "ptx jit compil",
    "unsupported toolchain",
    "too many resources requested",
)
"""What a device says of a kernel that it did not start; anything else may come from an earlier kernel."""


class KernelStartError(RuntimeError):
    """A backend's kernel could not be compiled or started; the cause is chained."""


@dataclass(frozen=True)
class CallClass:
    """The calls for which `auto` chooses alike: `op` is the implementation looked for, `caller` the op called."""

    op: str
    caller: str
    device: str
    dtype: torch.dtype
    head_dim: int
    channels: int
    folded: bool
    varlen: bool = False


class AutoBackend(str):
    """The name of a backend that `auto` chose for `calls`; as a `str` it is the name alone."""

    __slots__ = ("calls",)
    calls: CallClass

    def __new__(cls, name: str, calls: CallClass) -> "AutoBackend":
        self = super().__new__(cls, name)
        self.calls = calls
        return self


_failures: dict[tuple[str, str, CallClass], str] = {}
"""(registered op, backend, calls) -> why its kernels do not start."""
_logged: set[tuple[str, str]] = set()


def first_backend(calls: CallClass, op: str, at: str | None = None) -> AutoBackend:
    """The first backend of `auto`'s order, from `at` on, that runs the registered op `op` for `calls`."""
    order = AUTO_ORDER.get(calls.device, _AUTO_ORDER_ELSEWHERE)
    # What is measured is a dense batch.
    if (
        calls.device == "cuda"
        and not calls.varlen
        and (measured := tuned_backend(calls.caller, calls.dtype, calls.head_dim))
    ):
        order = (measured, *(name for name in order if name != measured))
    passed_over: list[str] = []
    for name in order if at is None else order[order.index(at) :]:
        candidate = BACKENDS[name]
        reason = candidate.unavailable_reason()
        lacking = candidate.lacks(calls.folded and name != at, calls.varlen)  # what ran forward runs backward as well
        if reason is None and (candidate.find(calls.op) is None or lacking):
            continue
        reason = reason or candidate.unsupported_reason(calls.device, calls.dtype, calls.head_dim)
        reason = reason or candidate.too_wide(calls.channels, calls.op) or _failures.get((op, name, calls))
        if reason is None:
            if passed_over:
                logger.info("%s runs on backend %r: %s", op, name, "; ".join(passed_over))
            return AutoBackend(name, calls)
        passed_over.append(f"{name}: {reason}")
    raise AssertionError("the reference backend takes everything")


def pass_over(name: str, op: str, calls: CallClass, error: KernelStartError) -> None:
    """From now on `auto` does not choose `name` for `calls` of the registered op `op`."""
    why = describe(error.__cause__ or error)
    _failures[op, str(name), calls] = why
    if (op, str(name)) not in _logged:
        _logged.add((op, str(name)))
        logger.warning("%s: a kernel of backend %r does not start, the next backend runs it (%s)", op, str(name), why)


def any_failure() -> bool:
    return bool(_failures)


def forget_failures() -> None:
    """For tests that plant them."""
    _failures.clear()
    _logged.clear()


def describe(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(getattr(error, "error_message", None) or error).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), '')}"


def is_start_failure(error: Exception) -> bool:
    """Whether a kernel was not compiled or not started, and nothing else is wrong."""
    if isinstance(error, (KernelStartError, ValueError, TypeError, MemoryError, torch.OutOfMemoryError)):
        return False
    if any(text in str(error) for text in _DEVICE_ERRORS):
        return any(text in str(error).lower() for text in _NOT_STARTED)
    kinds = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    if "triton.errors.TritonError" in kinds:
        return "triton.runtime.errors.InterpreterError" not in kinds
    return _passes_through(error.__traceback__, _COMPILES)


def _passes_through(traceback: TracebackType | None, modules: tuple[str, ...]) -> bool:
    while traceback is not None:
        name = str(traceback.tb_frame.f_globals.get("__name__"))
        if any(name == module or name.startswith(f"{module}.") for module in modules):
            return True
        traceback = traceback.tb_next
    return False


def guarded(op: str, run: Callable) -> Callable:
    """`run`, whose last argument is a backend's name, with errors of kernels that do not start as KernelStartError."""

    def run_guarded(*args: Any) -> Any:
        try:
            return run(*args)
        except Exception as error:
            if not is_start_failure(error):
                raise
            raise KernelStartError(
                f"{op}: a kernel of backend {str(args[-1])!r} cannot be compiled or started here: {describe(error)}; "
                "use backend='reference', or 'auto', which takes the next backend where it is called outside of "
                "torch.compile"
            ) from error

    return run_guarded
