"""When an op may run its implementation directly, because nothing would see it pass through the dispatcher."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)


def nothing_watches() -> bool:
    """Whether no tracer, mode, transform or profiler sees the ops called now (0.4 us)."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    )


def plain(args: Iterable[Any]) -> bool:
    """Whether no argument is of a tensor subclass, with a `__torch_dispatch__` of its own, or on the meta device."""
    for a in args:
        if type(a) in PLAIN:
            if a.is_meta:
                return False
        elif isinstance(a, Tensor):
            return False
    return True


def transformed(args: Iterable[Any]) -> bool:
    """Whether torch.func, or forward-mode differentiation, is at work on `args`."""
    if torch.compiler.is_compiling():
        return False
    return maybe_current_level() is not None or has_tangent(args)


def has_tangent(args: Iterable[Any]) -> bool:
    """Whether forward-mode differentiation is at work on `args`."""
    return forward_ad._current_level >= 0 and any(
        isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
    )
