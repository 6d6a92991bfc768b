"""Recomputes in backward what one cheap pass can compute again, instead of keeping it.

A Linear saves its input. Where that is a normed tensor or a GELU output, it follows from tensors that backward keeps
anyway: the norm's input, the pre-activation. Saved-tensor hooks store how to compute it instead; the Linears, and LoRA
or quantised ones in their place, are untouched. A block leaves 12 units of [N, C] instead of 18, and the gradients are
the same bits, since the op that made the tensor runs again.

Active inside `scope()`, while gradients are on; not while torch.compile is tracing (it plans memory by itself), nor
under torch.func or forward-mode AD. What is edited in place before a Linear saves it is kept: version counters tell,
and since they do not count edits through `.data`, so is what a forward pre-hook gets.
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

MODIFIED = (
    "a tensor that backward needs was modified in place after forward; "
    "call backward before changing parameters or activations"
)


@dataclass(frozen=True)
class Rematerialization:
    """How to compute a tensor again: `compute()`, valid while `inputs` are unmodified."""

    compute: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def run(self, shape: torch.Size) -> Tensor:
        if tuple(t._version for t in self.inputs) != self.versions:
            raise RuntimeError(MODIFIED)
        with torch.no_grad():
            return self.compute().view(shape)


@dataclass(frozen=True)
class Kept:
    """A tensor as it is, valid while unmodified: autograd compares no versions of what went through hooks."""

    tensor: Tensor
    version: int | None

    @classmethod
    def of(cls, tensor: Tensor) -> "Kept":
        return cls(tensor, None if tensor.is_inference() else tensor._version)

    def run(self, shape: torch.Size) -> Tensor:
        if self.version not in (None, self.tensor._version):
            raise RuntimeError(MODIFIED)
        return self.tensor


def _storage_of(tensor: Tensor) -> int:
    """Tells live storages apart, those of fake and meta tensors too, which have no memory."""
    return tensor.untyped_storage()._cdata


class _Scope:
    """How to compute live tensors again, by their storage."""

    def __init__(self) -> None:
        self.entries: dict[int, tuple[weakref.ref[Tensor], int, Rematerialization]] = {}

    def register(self, tensor: Tensor, rematerialization: Rematerialization) -> None:
        # A number is reused once its storage dies: the weak reference tells the tensor meant from a later one.
        self.entries[_storage_of(tensor)] = (weakref.ref(tensor), tensor._version, rematerialization)

    def pack(self, saved: Tensor) -> tuple[Rematerialization | Kept, torch.Size]:
        return self._source(saved), saved.shape

    def _source(self, saved: Tensor) -> Rematerialization | Kept:
        entry = self.entries.get(_storage_of(saved))
        if entry is None:
            return Kept.of(saved)
        meant, version, rematerialization = entry[0](), *entry[1:]
        # A tensor written to since (a pre-hook, ReLU(inplace=True) before a Linear) is not what would be recomputed.
        same = meant is not None and saved.numel() == meant.numel() and saved._version == version
        return rematerialization if same and saved.is_contiguous() else Kept.of(saved)

    @staticmethod
    def unpack(packed: tuple[Rematerialization | Kept, torch.Size]) -> Tensor:
        source, shape = packed
        return source.run(shape)


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Scope] = []


_active = _Scopes()


def _top_hooks() -> tuple[Callable, Callable] | None:
    """The saved-tensor hooks that act here. Hooks do not chain: inside a checkpoint only the checkpoint's do."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(False)


def is_transformed() -> bool:
    """Whether a compiler, torch.func or forward-mode AD runs the code: hooks cannot see what they save or derive."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return traced or torch._C._are_functorch_transforms_active() or in_forward_ad()


def can_checkpoint() -> bool:
    """Whether `torch.utils.checkpoint` has something to save; torch.func refuses its saved-tensor hooks."""
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


def in_forward_ad() -> bool:
    """Whether tangents are propagated, by torch.func.jvp or in a `torch.autograd.forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


@contextlib.contextmanager
def _open() -> Iterator[None]:
    scope = _Scope()
    _active.stack.append(scope)
    try:
        with torch.autograd.graph.saved_tensors_hooks(scope.pack, scope.unpack):
            yield
    finally:
        _active.stack.pop()


def scope() -> contextlib.AbstractContextManager[None]:
    """What `rematerialize` is given inside is recomputed instead of saved; a null context where it cannot be."""
    if is_transformed() or not torch.is_grad_enabled() or _top_hooks() is not None:
        return contextlib.nullcontext()
    return _open()


def active() -> bool:
    """Whether `rematerialize` has an effect here: inside a scope, and not inside a checkpoint in it.

    There an entry would only hold its inputs until the scope ends: 5 units a block for a whole model's forward.
    """
    if not _active.stack or is_transformed() or not torch.is_grad_enabled():
        return False
    hooks = _top_hooks()
    return hooks is None or getattr(hooks[0], "__self__", None) is _active.stack[-1]


def rematerialize(tensor: Tensor, compute: Callable[[], Tensor], *inputs: Tensor | None) -> Tensor:
    """Returns `tensor`; where autograd saves it whole in this scope, backward calls `compute` instead.

    Args:
        tensor: contiguous, made by an op just now.
        compute: gives the same bits from `inputs`, under no_grad; it must hold detached tensors only.
        inputs: what `compute` reads; modified in place before backward, they raise a RuntimeError there.
    """
    if active() and tensor.requires_grad and tensor.is_contiguous():
        given = tuple(t for t in inputs if t is not None)
        _active.stack[-1].register(tensor, Rematerialization(compute, given, tuple(t._version for t in given)))
    return tensor


def keep(tensor: Tensor) -> Tensor:
    """Returns `tensor`, which autograd saves as usual from here on."""
    if active():
        _active.stack[-1].entries.pop(_storage_of(tensor), None)
    return tensor
