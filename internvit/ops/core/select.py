"""The backends an op can run on, which of them exist here, and which one a call takes.

A backend is asked for by an op's `backend=` argument, by `internvit.backend("triton")` around the call or once for the
process, or by the environment variable INTERNVIT_BACKEND; else `auto` takes the first one in `AUTO_ORDER` that
implements the op for this device, dtype and head dimension. Nothing is imported, compiled or asked of a device before
a call needs it.
"""

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger("internvit")

REFERENCE: dict[str, Callable] = {}
"""The pure-PyTorch implementation of each op, filled by the op files themselves."""


@dataclass(frozen=True)
class Backend:
    """One way to run ops.

    Attributes:
        find: op name -> the function that runs it, None where this backend does not implement that op.
        missing: why this backend cannot run on this machine and how to get it; None when it can.
        rejects: (device type, dtype, head_dim or 0) -> why it cannot take such a tensor; None when it can.
        folds_qk_norm: its `attention` takes QK-norm's weights and statistics.
        max_channels: the widest rows that its norms take; None for any.
        lse_devices: the device types on which its `attention` returns the log-sum-exp; None for all.
    """

    name: str
    find: Callable[[str], Callable | None]
    missing: Callable[[], str | None]
    rejects: Callable[[str, torch.dtype, int], str | None]
    folds_qk_norm: bool = True
    max_channels: int | None = None
    lse_devices: tuple[str, ...] | None = None

    def exposes_lse_on(self, device: str) -> bool:
        return self.lse_devices is None or device in self.lse_devices


def reference(op: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as the pure-PyTorch implementation of `op`."""

    def register(function: Callable) -> Callable:
        REFERENCE[op] = function
        return function

    return register


def op_file(op: str) -> str:
    """The file that an op lives in, the same in every folder: `rms_norm_backward` -> `rms_norm`."""
    return "linear_gelu" if op.startswith("gelu") else op.removesuffix("_backward").removesuffix("_packed")


def _triton(op: str) -> Callable | None:
    from internvit.ops.backends import triton

    return getattr(triton, op) if op in triton.__all__ else None


def _from_attention_module(module: str) -> Callable[[str], Callable | None]:
    return lambda op: getattr(importlib.import_module(module), op, None) if op_file(op) == "attention" else None


def _from_library(library: str) -> Callable[[str], Callable | None]:
    def find(op: str) -> Callable | None:
        from internvit.ops.backends import native

        return native.find(library, op)

    return find


def with_linear_gelu(name: str, find: Callable[[str], Callable | None]) -> Callable[[str], Callable | None]:
    """`find` of backend `name`, which has a GELU, and with it PyTorch's Linear before that."""

    def found(op: str) -> Callable | None:
        if op != "linear_gelu" or find("gelu") is None:
            return find(op)
        from internvit.ops.linear_gelu import linear_then_gelu

        return functools.partial(linear_then_gelu, name)

    return found


def _cuda(op: str) -> Callable | None:
    """The library's op, or what it leaves to PyTorch and flash-attn."""
    from internvit.ops.backends import cuda

    return _from_library("internvit_cuda")(op) or getattr(cuda, op, None)


def _library_missing(library: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        from internvit.ops.backends import native

        return native.missing(library)

    return missing


def _package_missing(package: str, how: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(package) else f"the package {package} is not installed: {how}"


def _only(devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Callable[[str, torch.dtype, int], str | None]:
    def rejects(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        if device not in devices:
            return f"it runs on {' and '.join(devices)} tensors, got {device}"
        if dtype not in dtypes:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {dtype}"
        return None

    return rejects


def _triton_rejects(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on GPU tensors (or on CPU tensors in the interpreter, TRITON_INTERPRET=1), got cpu"
    if head_dim % 8 or head_dim > 128:
        return f"it takes a head dimension that is a multiple of 8 up to 128, got {head_dim}"
    return _only(("cuda", "cpu"), (torch.float32, torch.bfloat16, torch.float16))(device, dtype, head_dim) or (
        _triton_fails_on_gpu() if device == "cuda" else None
    )


def _triton_fails_on_gpu() -> str | None:
    """Why Triton cannot serve the visible GPUs, the least capable of them; None without one, as for fake tensors."""
    if not torch.cuda.is_available():
        return None
    from internvit.kernels.common import launch, target

    reasons = map(target.unsupported_reason, range(torch.cuda.device_count()))
    return next((why for why in reasons if why), None) or launch.failure_to_start()


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("reference", REFERENCE.get, lambda: None, lambda device, dtype, head_dim: None),
        Backend(
            "sdpa",
            _from_attention_module("internvit.ops.backends.sdpa"),
            lambda: None,
            lambda device, dtype, head_dim: None,
            folds_qk_norm=False,
            lse_devices=("cpu", "cuda"),
        ),
        Backend(
            "flash",
            _from_attention_module("internvit.ops.backends.flash"),
            _package_missing("flash_attn", "pip install 'internvit[flash]' on a machine with an NVIDIA GPU"),
            _only(("cuda",), (torch.bfloat16, torch.float16)),
            folds_qk_norm=False,
        ),
        Backend(
            "triton",
            _triton,
            _package_missing("triton", "pip install triton (Linux; torch's CUDA builds bring it)"),
            _triton_rejects,
            max_channels=8192,
        ),
        Backend(
            "cpu",
            with_linear_gelu("cpu", _from_library("internvit_cpu")),
            _library_missing("internvit_cpu"),
            _only(("cpu",), _FLOATS),
        ),
        Backend(
            "cuda",
            with_linear_gelu("cuda", _cuda),
            _library_missing("internvit_cuda"),
            _only(("cuda",), _FLOATS),
            folds_qk_norm=False,
            lse_devices=(),
        ),
    )
}

# Triton before cuda: it folds QK-norm into attention, and q_hat and k_hat need no memory. No GPU has timed the two yet.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "sdpa", "reference"),
    "cuda": ("triton", "cuda", "sdpa", "reference"),
}
_AUTO_ORDER_ELSEWHERE = ("sdpa", "reference")

_FROM_ENVIRONMENT = os.environ.get("INTERNVIT_BACKEND", "auto")
_requested: ContextVar[str] = ContextVar("internvit_backend", default=_FROM_ENVIRONMENT)
_latest = [_FROM_ENVIRONMENT]
"""The value set last, in any thread: what is compiled by a torch that cannot trace a ContextVar reads it."""
_TRACES_CONTEXT_VARIABLES = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14)


class backend(contextlib.AbstractContextManager):  # noqa: N801 (used like a function, as torch.set_grad_enabled is)
    """Chooses the backend of all ops called from here on, or inside a `with`.

    Ops the backend does not implement (`sdpa` and `flash` are attention only) run as under `auto`.

    Args:
        name: "auto", "reference", "cpu", "triton", "cuda", "sdpa" or "flash".

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend cannot run on this machine; the message says how to get it.

    Example:
        >>> with internvit.backend("reference"):
        ...     features = model(pixels)
    """

    def __init__(self, name: str) -> None:
        self.name = name
        if name != "auto":
            _usable(name)
        self._token = _requested.set(name)
        _latest[0] = name

    def __exit__(self, *exc_info: object) -> None:
        _requested.reset(self._token)
        _latest[0] = _requested.get()

    def __repr__(self) -> str:
        return f"internvit.backend({self.name!r})"


def requested() -> str:
    """The backend name in force for ops called without `backend=`."""
    if torch.compiler.is_compiling() and not _TRACES_CONTEXT_VARIABLES:
        return _latest[0]
    return _requested.get()


@functools.cache
def implementation(op: str, name: str) -> Callable:
    """The function that runs `op` on backend `name`."""
    found = _usable(name).find(op)
    if found is None:
        raise ValueError(f"backend: {name!r} does not implement {op}")
    return found


def implements(op: str, name: str) -> bool:
    """Whether backend `name`, usable here, has `op`."""
    return BACKENDS[name].find(op) is not None


def _usable(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(['auto', *BACKENDS])}, got {name!r}")
    found = BACKENDS[name]
    why = found.missing()
    if why is not None:
        raise RuntimeError(f"backend {name!r} is not available: {why}")
    return found


def resolve(
    op: str,
    x: torch.Tensor,
    asked: str | None = None,
    head_dim: int = 0,
    folded: bool = False,
    caller: str | None = None,
) -> str:
    """The name of the backend that `op` takes for tensors like `x`, by the argument, the context, or `auto`.

    `folded` asks for an attention that takes QK-norm's weights and statistics; `caller` is the op that errors name
    where it is another one that the user called.
    """
    channels = _channels(caller or op, x)
    return _resolve(op, x.device.type, x.dtype, head_dim, folded, caller or op, asked or "", requested(), channels)


def _channels(op: str, x: torch.Tensor) -> int:
    """The channels of the rows that `op` normalises or scales; 0 where their number does not matter."""
    if op in ("attention", "gelu", "linear_gelu") or x.dim() == 0:
        return 0
    return x.shape[-1] * x.shape[-2] if op.startswith("qk_norm") else x.shape[-1]


def _resolve(*key: Any) -> str:
    return _resolve_once(*key)


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
) -> str:
    if asked and asked != "auto":
        chosen = _usable(asked)
        if chosen.find(op) is None:
            raise ValueError(f"{caller}: backend {asked!r} does not implement this op")
        why = chosen.rejects(device, dtype, head_dim) or _too_wide(chosen, channels)
        if why is None and folded and not chosen.folds_qk_norm:
            why = "its attention has no QK-norm inside; normalise with qk_norm, or call qk_norm_attention"
        if why is not None:
            raise ValueError(
                f"{caller}: backend {asked!r} cannot take this input: {why}; use backend='reference', or 'auto' to "
                "have one chosen"
            )
        return asked
    if context != "auto" and not asked and _usable(context).find(op) is not None:
        return _resolve_once(op, device, dtype, head_dim, folded, caller, context, "auto", channels)
    passed_over: list[str] = []
    for name in AUTO_ORDER.get(device, _AUTO_ORDER_ELSEWHERE):
        candidate = BACKENDS[name]
        why = candidate.missing()
        if why is None and (candidate.find(op) is None or (folded and not candidate.folds_qk_norm)):
            continue
        why = why or candidate.rejects(device, dtype, head_dim) or _too_wide(candidate, channels)
        if why is None:
            if passed_over:
                logger.info("%s runs on backend %r: %s", op, name, "; ".join(passed_over))
            return name
        passed_over.append(f"{name}: {why}")
    raise AssertionError("the reference backend takes everything")


def _too_wide(candidate: Backend, channels: int) -> str | None:
    if candidate.max_channels is None or channels <= candidate.max_channels:
        return None
    return f"it takes rows of at most {candidate.max_channels} channels, got {channels}"


def table() -> list[dict[str, str]]:
    """What each backend is on this machine, as `internvit info` prints it."""
    rows = []
    for name, candidate in BACKENDS.items():
        why = candidate.missing()
        rows.append({"backend": name, "available": "no" if why else "yes", "reason": why or ""})
    return rows
