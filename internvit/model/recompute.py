"""Keeps for backward what one cheap pass can rebuild as a recipe, not as a tensor.

A Linear saves its input. Where that is a normed tensor or a GELU output, it can be had again from tensors that backward
keeps anyway: the norm's input, the pre-activation. Saved-tensor hooks store the recipe instead; the Linears, and LoRA
or quantised ones in their place, are untouched. A block leaves 12 units of [N, C] instead of 18, and the gradients are
the same bits, since a recipe calls the op that made the tensor.

Active inside `scope()`, while gradients are on and torch.compile is not tracing (it plans memory by itself).
"""

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a tensor: `rebuild()`, valid while `inputs` are unmodified."""

    rebuild: Callable[[], Tensor]
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def run(self, shape: torch.Size) -> Tensor:
        if tuple(t._version for t in self.inputs) != self.versions:
            raise RuntimeError(
                "a tensor needed to recompute an activation in backward was modified in place after forward; "
                "call backward before changing parameters or activations"
            )
        with torch.no_grad():
            return self.rebuild().view(shape)


class _Scope:
    """The recipes of live tensors, by the address of their storage."""

    def __init__(self) -> None:
        self.recipes: dict[int, tuple[weakref.ref[Tensor], Recipe]] = {}

    def remember(self, tensor: Tensor, recipe: Recipe) -> None:
        address = tensor.untyped_storage().data_ptr()
        # An address is reused once its tensor dies: the weak reference tells the tensor meant from a later one.
        self.recipes[address] = (weakref.ref(tensor), recipe)

    def pack(self, saved: Tensor) -> Tensor | tuple[Recipe, torch.Size]:
        entry = self.recipes.get(saved.untyped_storage().data_ptr())
        if entry is None:
            return saved
        meant = entry[0]()
        whole = meant is not None and saved.numel() == meant.numel() and saved.is_contiguous()
        return (entry[1], saved.shape) if whole else saved

    @staticmethod
    def unpack(packed: Tensor | tuple[Recipe, torch.Size]) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[0].run(packed[1])


class _Scopes(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Scope] = []


_active = _Scopes()


def _top_hooks() -> tuple[Callable, Callable] | None:
    """The saved-tensor hooks that act here. Hooks do not chain: inside a checkpoint only the checkpoint's do."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return None if top is None else top(False)


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
    """Recipes given by `remember` inside replace what autograd would save; a null context where they cannot."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _top_hooks() is not None:
        return contextlib.nullcontext()
    return _open()


def active() -> bool:
    """Whether `remember` has an effect here: inside a scope, and not inside a checkpoint in it.

    There a recipe would only hold its inputs until the scope ends: 5 units a block for a whole model's forward.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not _active.stack:
        return False
    hooks = _top_hooks()
    return hooks is None or getattr(hooks[0], "__self__", None) is _active.stack[-1]


def remember(tensor: Tensor, rebuild: Callable[[], Tensor], *inputs: Tensor | None) -> Tensor:
    """Returns `tensor`; where autograd saves it whole in this scope, it keeps `rebuild` instead.

    Args:
        tensor: contiguous, made by an op just now.
        rebuild: gives the same bits from `inputs`, under no_grad; it must hold detached tensors only.
        inputs: what `rebuild` reads; modified in place before backward, they raise a RuntimeError there.
    """
    if active() and tensor.requires_grad and tensor.is_contiguous():
        given = tuple(t for t in inputs if t is not None)
        _active.stack[-1].remember(tensor, Recipe(rebuild, given, tuple(t._version for t in given)))
    return tensor
