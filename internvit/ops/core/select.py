"""Which backend a call takes: its `backend=`, `internvit.backend(...)`, `set_backend`, INTERNVIT_BACKEND, or `auto`.

`auto` takes the first backend of `AUTO_ORDER` that implements the op for this device, dtype and head dimension, and
whose kernels start (see `fallback`); before them the backend that a tuned file names (see `tuned`).
"""

import contextlib
import functools
import logging
import operator
import os
from contextvars import ContextVar
from typing import Any

import torch

from internvit.ops.backends.registry import BACKENDS, usable
from internvit.ops.core.fallback import CallClass, first_backend

logger = logging.getLogger("internvit")

_entered: ContextVar[tuple["backend", ...]] = ContextVar("internvit_backend", default=())
_process = [os.environ.get("INTERNVIT_BACKEND", "auto")]
_latest = [_process[0]]
"""The value set last, in any thread: what is compiled by a torch that cannot trace a ContextVar reads it."""
_TRACES_CONTEXT_VARIABLES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14)


class backend(contextlib.AbstractContextManager):  # noqa: N801 (used like a function, as torch.device is)
    """Chooses the backend of the ops called inside a `with`, in this thread; see `set_backend` for the process.

    Ops the backend does not implement run as under `auto` (`sdpa` and `flash` are attention only), those of
    `triton_gemm` as under `triton`: it is the block's Linears alone, and never chosen by `auto`.

    Args:
        name: "auto", "reference", "cpu", "triton", "triton_gemm", "cuda", "sdpa" or "flash".

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run on this machine; the message says how to get it.

    Example:
        >>> with internvit.backend("reference"):
        ...     features = model(pixels)
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name)
        self._used = False

    def __enter__(self) -> "backend":
        self._used = True
        _entered.set((*_entered.get(), self))
        _latest[0] = self.name
        return self

    def __exit__(self, *exc_info: object) -> None:
        # Contexts may be left in another order than they were entered in: each takes its own entry away.
        active = list(_entered.get())
        del active[len(active) - 1 - active[::-1].index(self)]
        _entered.set(tuple(active))
        _latest[0] = requested()

    def __del__(self) -> None:
        if not getattr(self, "_used", True):
            logger.warning("%r chose nothing: use it in a `with`, or call internvit.set_backend(%r)", self, self.name)

    def __repr__(self) -> str:
        return f"internvit.backend({self.name!r})"


def set_backend(name: str) -> None:
    """Chooses the backend of ops in every thread of the process, outside of `with internvit.backend(...)`.

    Args:
        name: as for `backend`; "auto" takes the choice back.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run on this machine; the message says how to get it.
    """
    _process[0] = _latest[0] = _checked(name)


def _checked(name: str) -> str:
    if name != "auto":
        usable(name)
    return name


def requested() -> str:
    """The backend name in force for ops called without `backend=`."""
    if torch.compiler.is_compiling() and not _TRACES_CONTEXT_VARIABLES:
        return _latest[0]
    entered = _entered.get()
    return entered[-1].name if entered else _process[0]


def check_named(name: str, x: torch.Tensor | None = None, *dtypes: torch.dtype) -> None:
    """Refuses a registered op's `backend` that is none here, or one that does not take tensors like `x` or `dtypes`."""
    chosen = usable(name)
    if x is None:
        return
    for dtype in (x.dtype, *dtypes):
        reason = chosen.unsupported_reason(x.device.type, dtype, 0)
        if reason is not None:
            raise ValueError(f"backend {name!r} cannot take this input: {reason}")


def resolve(
    op: str,
    x: torch.Tensor,
    asked: str | None = None,
    head_dim: int = 0,
    folded: bool = False,
    caller: str | None = None,
    varlen: bool = False,
) -> str:
    """The name of the backend that `op` takes for tensors like `x`, by the argument, the context, or `auto`.

    `folded` asks for an attention that takes QK-norm's weights and statistics, `varlen` for one that takes packed
    sequences; `caller` is the op that errors name where it is another one that the user called. A name that `auto`
    chose is an `AutoBackend`, outside of traces.
    """
    # A size that an exported graph leaves open is 0, which every backend takes; it is checked when the program runs. A
    # compiled one with dynamic shapes knows it, and is guarded by operator.index: the choice depends on it.
    sizes = head_dim, _channels(caller or op, x)
    head_dim, channels = (0 if isinstance(n, torch.SymInt) else operator.index(n) for n in sizes)
    key = op, x.device.type, x.dtype, head_dim, folded, caller or op, asked or "", requested(), channels, varlen
    return _resolve(*key) if torch.compiler.is_compiling() else _resolve_once(*key)


def _channels(op: str, x: torch.Tensor) -> int:
    """The channels of the rows that `op` normalises or scales; 0 where their number does not matter."""
    if op in ("attention", "gelu", "linear_gelu") or x.dim() == 0:
        return 0
    return x.shape[-1] * x.shape[-2] if op.startswith("qk_norm") else x.shape[-1]


def _resolve(*key: Any) -> str:
    return str(_resolve_once(*key))


# What torch.compiler.assume_constant_result does; calling it would import torch._dynamo, 1.3 s of `import internvit`.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _resolve_once(
    op: str,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    folded: bool,
    caller: str,
    asked: str,
    context: str,
    channels: int = 0,
    varlen: bool = False,
) -> str:
    name = asked or context
    while not asked and name != "auto" and usable(name).find(op) is None:
        name = BACKENDS[name].fallback
    calls = CallClass(op, caller, device, dtype, head_dim, channels, folded, varlen)
    return first_backend(calls, caller) if name == "auto" else _asked_by_name(name, calls)


def forget_resolved() -> None:
    """Choices are made anew, as after a kernel did not start."""
    _resolve_once.cache_clear()


def _asked_by_name(name: str, calls: CallClass) -> str:
    chosen = usable(name)
    if chosen.find(calls.op) is None:
        raise ValueError(f"{calls.caller}: backend {name!r} does not implement this op")
    reason = chosen.unsupported_reason(calls.device, calls.dtype, calls.head_dim)
    reason = reason or chosen.too_wide(calls.channels, calls.op) or chosen.lacks(calls.folded, calls.varlen)
    if reason is not None:
        raise ValueError(
            f"{calls.caller}: backend {name!r} cannot take this input: {reason}; use backend='reference', or 'auto' to "
            "have one chosen"
        )
    return chosen.name
