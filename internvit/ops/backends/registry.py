"""The backends, which of them exist on this machine, and the function that runs each op on each of them.

A backend's module registers its implementations by `@implements(op, backend)`; it is imported when the backend is
first asked for an op, so that importing the package loads no library and compiles nothing.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_IMPLEMENTATIONS: dict[tuple[str, str], Callable] = {}

Unsupported = Callable[[str, torch.dtype, int], str | None]


@dataclass(frozen=True)
class Backend:
    """One set of implementations.

    Attributes:
        module: of this folder, registers them when imported; None for those that the op files register themselves.
        unavailable_reason: why this backend cannot run on this machine and how to get it; None when it can.
        unsupported_reason: (device type, dtype, head_dim or 0) -> why it cannot take such a tensor; None when it can.
        folds_qk_norm: its `attention` takes QK-norm's weights and statistics.
        varlen: its `attention` takes packed sequences.
        varlen_unsupported_reason: why it cannot on this machine, where it depends on what is installed.
        max_channels: the widest rows that its norms take; None for any.
        max_channels_of: op -> the same, where it differs.
        lse_devices: the device types on which its `attention` returns the log-sum-exp; None for all.
        fallback: runs the ops that it lacks, inside `internvit.backend(name)`.
    """

    name: str
    module: str | None
    unavailable_reason: Callable[[], str | None]
    unsupported_reason: Unsupported
    folds_qk_norm: bool = True
    varlen: bool = False
    varlen_unsupported_reason: Callable[[], str | None] = lambda: None
    max_channels: int | None = None
    max_channels_of: Mapping[str, int] = field(default_factory=dict, hash=False)
    lse_devices: tuple[str, ...] | None = None
    fallback: str = "auto"

    def exposes_lse_on(self, device: str) -> bool:
        return self.lse_devices is None or device in self.lse_devices

    def too_wide(self, channels: int, op: str) -> str | None:
        """Why rows of so many channels are too wide for `op`; None where they are not."""
        widest = self.max_channels_of.get(op, self.max_channels)
        if widest is None or channels <= widest:
            return None
        return f"it takes rows of at most {widest} channels, got {channels}"

    def lacks(self, folded: bool, varlen: bool) -> str | None:
        """Why its attention cannot take such arguments; None where it can."""
        reason = None
        if varlen:
            reason = self.varlen_unsupported_reason() if self.varlen else "its attention takes no cu_seqlens"
        if reason is not None:
            return reason
        if folded and not self.folds_qk_norm:
            return "its attention has no QK-norm inside; normalise with qk_norm, or call qk_norm_attention"
        return None

    def find(self, op: str) -> Callable | None:
        """The function that runs `op`; None where this backend has none."""
        _load(self)
        return _IMPLEMENTATIONS.get((op, self.name))


def implements(op: str, backend: str) -> Callable[[Callable], Callable]:
    """Registers the decorated function as what runs `op` on `backend`; it takes the op's arguments without `backend`.

    A gradient that its `output_mask` does not ask for may be returned as None.
    """

    def register(function: Callable) -> Callable:
        _IMPLEMENTATIONS[op, backend] = function
        return function

    return register


def implements_all(namespace: Any, backend: str, ops: Iterable[str]) -> None:
    """Registers as `backend` the ops of a loaded library's `torch.ops` namespace that have one of the names `ops`."""
    for op in ops:
        if hasattr(namespace, op):
            implements(op, backend)(getattr(namespace, op).default)


def implementation(op: str, backend: str) -> Callable:
    """The function that runs `op` on `backend`.

    Raises:
        ValueError: no such backend, or it has no such op.
        RuntimeError: the backend is not available here.
    """
    function = _IMPLEMENTATIONS.get((op, backend)) or usable(backend).find(op)
    if function is None:
        raise ValueError(f"backend: {backend!r} does not implement {op}")
    return function


def has_implementation(op: str, backend: str) -> bool:
    """Whether `backend`, available here, has `op`."""
    return BACKENDS[backend].find(op) is not None


def usable(name: str) -> Backend:
    """The backend `name`.

    Raises:
        ValueError: no such backend.
        RuntimeError: it is not available here; the message says how to get it.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(['auto', *BACKENDS])}, got {name!r}")
    reason = BACKENDS[name].unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend {name!r} is not available: {reason}")
    return BACKENDS[name]


@functools.cache
def _load(backend: Backend) -> None:
    if backend.module is not None and backend.unavailable_reason() is None:
        importlib.import_module(f".{backend.module}", __package__)


def _library(name: str) -> Callable[[], str | None]:
    def unavailable_reason() -> str | None:
        from internvit.ops.backends import native

        return native.unavailable_reason(name)

    return unavailable_reason


def _package(name: str, how: str) -> Callable[[], str | None]:
    return lambda: None if importlib.util.find_spec(name) else f"the package {name} is not installed: {how}"


def _only(devices: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Unsupported:
    def unsupported_reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
        if device not in devices:
            return f"it runs on {' and '.join(devices)} tensors, got {device}"
        if dtype not in dtypes:
            return f"it takes {', '.join(str(d).removeprefix('torch.') for d in dtypes)}, got {dtype}"
        return None

    return unsupported_reason


def _triton_unsupported(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it runs on GPU tensors (or on CPU tensors in the interpreter, TRITON_INTERPRET=1), got cpu"
    if head_dim % 8 or head_dim > 128:
        return f"it takes a head dimension that is a multiple of 8 up to 128, got {head_dim}"
    reason = _only(("cuda", "cpu"), _FLOATS)(device, dtype, head_dim)
    return reason or (_triton_fails_on_gpu() if device == "cuda" else None)


def _triton_fails_on_gpu() -> str | None:
    """Why Triton cannot serve the visible GPUs, the least capable of them; None without one, as for fake tensors."""
    if not torch.cuda.is_available():
        return None
    from internvit.kernels.common import launch, target

    reasons = map(target.unsupported_reason, range(torch.cuda.device_count()))
    return next((reason for reason in reasons if reason), None) or launch.failure_to_start()


def _cuda_unsupported(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    return _only(("cuda",), _FLOATS)(device, dtype, head_dim) or _below_8_0()


def _below_8_0() -> str | None:
    """Why the compiled library has no code for one of the visible GPUs."""
    if torch.version.hip or not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major < 8:
            return f"it needs compute capability 8.0 or higher, GPU {index} has {major}.{minor}"
    return None


def _flash_unavailable() -> str | None:
    from internvit.ops.backends import flash

    return flash.unavailable_reason()


def _flash_unsupported(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    from internvit.ops.backends import flash

    return flash.unsupported_reason(device, dtype, head_dim)


def _flash_varlen_unsupported() -> str | None:
    from internvit.ops.backends import flash

    return flash.varlen_unsupported_reason()


def _anything(device: str, dtype: torch.dtype, head_dim: int) -> None:
    return None


def _always() -> None:
    return None


BACKENDS: dict[str, Backend] = {
    b.name: b
    for b in (
        Backend("reference", None, _always, _anything, varlen=True),
        Backend(
            "sdpa",
            "sdpa",
            _always,
            _anything,
            folds_qk_norm=False,
            varlen=True,
            lse_devices=("cpu", "cuda"),
        ),
        Backend(
            "flash",
            "flash",
            _flash_unavailable,
            _flash_unsupported,
            folds_qk_norm=False,
            varlen=True,
            varlen_unsupported_reason=_flash_varlen_unsupported,
        ),
        Backend(
            "triton",
            "triton",
            _package("triton", "pip install triton (Linux; torch's CUDA builds bring it)"),
            _triton_unsupported,
            varlen=True,
            max_channels=8192,
            max_channels_of={"per_token_quant": 16384, "gelu_quant": 16384},
        ),
        Backend(
            "triton_gemm",
            "triton_gemm",
            _package("triton", "pip install triton (Linux; torch's CUDA builds bring it)"),
            _triton_unsupported,
            varlen=True,
            fallback="triton",
        ),
        Backend("cpu", "cpu", _library("internvit_cpu"), _only(("cpu",), _FLOATS), varlen=True),
        Backend(
            "cuda",
            "cuda",
            _library("internvit_cuda"),
            _cuda_unsupported,
            folds_qk_norm=False,
            max_channels=8192,
            lse_devices=(),
        ),
    )
}


def table() -> list[dict[str, str]]:
    """What each backend is on this machine, as `internvit info` prints it."""
    rows = []
    for name, candidate in BACKENDS.items():
        reason = candidate.unavailable_reason()
        rows.append({"backend": name, "available": "no" if reason else "yes", "reason": reason or ""})
    return rows


def backends_for(
    op: str, device: str, dtype: torch.dtype, head_dim: int = 0, folded: bool = False, varlen: bool = False
) -> list[str]:
    """The backends that can run `op` here; attention `folded` with QK-norm inside, `varlen` of packed sequences."""
    return [
        name
        for name, backend in BACKENDS.items()
        if backend.unavailable_reason() is None
        and backend.unsupported_reason(device, dtype, head_dim) is None
        and backend.find(op) is not None
        and backend.lacks(folded, varlen) is None
    ]
