"""What looks on when an op is called: whether it may run directly, and whether a graph for other programs is made."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad

PLAIN = (Tensor, torch.nn.Parameter)


def nothing_watches() -> bool:
    """Whether no tracer, mode, transform or profiler sees the ops called now (0.4 us)."""
    return not (traced() or modes() or torch.autograd._profiler_enabled())


def traced() -> bool:
    """Whether the ops called now are recorded for other inputs, or stand for a transform of them."""
    return (
        torch.compiler.is_compiling() or maybe_current_level() is not None or torch._C._get_tracing_state() is not None
    )


def modes() -> bool:
    """Whether a mode sees the ops called now: one of fake tensors, a counter, `torch.device` as a context."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


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


def leaves_library(chosen_by_auto: bool) -> bool:
    """Whether the graph made now is for programs without this library: ONNX, or TorchScript unless a backend is named.

    An ONNX file has no other ops; a traced graph keeps those of a backend that was asked for.
    """
    return (chosen_by_auto and torch._C._get_tracing_state() is not None) or exports_onnx()


def exports_onnx() -> bool:
    """Whether torch.onnx.export runs now."""
    onnx = sys.modules.get("torch.onnx")  # which takes a while to import
    return onnx is not None and onnx.is_in_onnx_export()


# As torch.compiler.assume_constant_result, which imports torch._dynamo.
exports_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]
