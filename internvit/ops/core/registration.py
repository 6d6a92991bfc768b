"""Defines the ops of namespace `internvit`, once, in Python: schema, fake, autograd, choice of implementation.

Every schema ends in `str backend`, a name already resolved (see `backends.resolve`): it is kept for backward, so that
backward runs where forward ran, and it is baked into compiled and exported graphs. Calls go through the dispatcher
always, so that selective checkpointing, FLOP counters, fake tensors and export see them.

The Autograd key is implemented directly with an `autograd.Function` (20.8 us a call with gradients against 31.0 us
through `torch.library.register_autograd`, 2 outputs, torch 2.14, one Xeon core).
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.autograd import Function

from internvit.ops.core.flops import register_when_counted
from internvit.ops.core.select import implementation

Mask: TypeAlias = "tuple[bool, ...] | list[bool]"

LIBRARY = torch.library.Library("internvit", "DEF")


def below_autograd(op: Callable, *args: Any) -> Any:
    """Calls `op` past its own Autograd kernel: how an `autograd.Function` runs the forward it wraps."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def define(
    schema: str,
    *,
    fake: Callable,
    run: Callable | None = None,
    autograd: type[Function] | None = None,
) -> Callable:
    """Defines one op and returns its overload.

    Args:
        schema: `name(arguments, str backend) -> outputs`.
        fake: the outputs' shapes, strides and dtypes from fake inputs; takes all arguments.
        run: called with all arguments; by default it looks the op up in the backend and calls it without `backend`.
        autograd: the Function whose forward calls `below_autograd`; without one, differentiating the op is an error.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    op = getattr(torch.ops.internvit, name).default

    def run_in_backend(*args: Any) -> Any:
        outputs = implementation(name, args[-1])(*args[:-1])
        if isinstance(outputs, tuple):  # a schema knows no optional output
            like = next(a for a in args if isinstance(a, torch.Tensor))
            outputs = tuple(empty_grad(like) if t is None else t for t in outputs)
        return outputs

    LIBRARY.impl(name, run or run_in_backend, "CompositeExplicitAutograd")
    torch.library.register_fake(f"internvit::{name}", fake, lib=LIBRARY)

    function = autograd or _undifferentiable(name, op)

    def dispatch_autograd(*args: Any) -> Any:
        register_when_counted()
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return function.apply(*args)
        return below_autograd(op, *args)

    LIBRARY.impl(name, dispatch_autograd, "Autograd")
    return op


def _undifferentiable(name: str, op: Callable) -> type[Function]:
    class Undifferentiable(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"internvit::{name} has no derivative: double backward is not implemented; "
                "use internvit.reference or plain PyTorch where second derivatives are needed"
            )

    return Undifferentiable


def empty_grad(like: torch.Tensor) -> torch.Tensor:
    """Stands in an op's outputs for a gradient nobody asked for (schemas know no optional output): float32 [0]."""
    return like.new_empty(0, dtype=torch.float32)


def wanted(grads: tuple[torch.Tensor, ...], mask: tuple[bool, ...] | list[bool]) -> tuple[torch.Tensor | None, ...]:
    """A backward op's outputs as autograd wants them: None where no gradient was asked for."""
    return tuple(g if asked else None for g, asked in zip(grads, mask, strict=True))
