"""FLOP formulas of the ops that multiply matrices, for `torch.utils.flop_counter.FlopCounterMode`.

That module imports triton (0.11 s), so the formulas are registered by the first call of an op after somebody else has
imported it.
"""

import sys
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_COUNTER = "torch.utils.flop_counter"
_Shape = tuple[int, ...]


def _attention(q: _Shape, products: int) -> int:
    batch, tokens, heads, head_dim = q
    return products * 2 * batch * heads * tokens * tokens * head_dim


def _without_kind(qkv: _Shape) -> _Shape:
    return (*qkv[:2], *qkv[3:])


# Forward: q k^T and p v. Backward: both again as dv, dp, dq, dk, and the scores recomputed.
_FORMULAS: dict[str, Callable[..., int]] = {
    "attention": lambda q, *args, **kwargs: _attention(q, 2),
    "attention_backward": lambda grad, q, *args, **kwargs: _attention(q, 5),
    "qk_norm_attention": lambda q, *args, **kwargs: _attention(q, 2),
    "qk_norm_attention_backward": lambda grad, q, *args, **kwargs: _attention(q, 5),
    "qk_norm_attention_packed": lambda qkv, *args, **kwargs: _attention(_without_kind(qkv), 2),
    "qk_norm_attention_packed_backward": lambda grad, qkv, *args, **kwargs: _attention(_without_kind(qkv), 5),
    "linear_gelu": lambda x, weight, *args, **kwargs: 2 * prod(x) * weight[0],
    "linear_gelu_backward": lambda grad, x, weight, pre, mask, *args, **kwargs: (
        2 * prod(grad) * weight[1] * (bool(mask[0]) + bool(mask[1]))
    ),
    "linear_layer_scale": lambda x, weight, *args, **kwargs: 2 * prod(x) * weight[0],
    "linear_layer_scale_backward": lambda grad, x, weight, bias, gamma, mask, *args, **kwargs: (
        2 * prod(grad) * weight[1] * (bool(mask[0]) + bool(mask[1] or mask[3]))
    ),
}
_registered = False


def register_when_counted() -> None:
    """Registers the formulas once, if torch's FLOP counter is there to use them."""
    global _registered
    if _registered or _COUNTER not in sys.modules:
        return
    _registered = True
    module: Any = sys.modules[_COUNTER]
    ops = {getattr(torch.ops.internvit, name): formula for name, formula in _FORMULAS.items()}
    for op, formula in ops.items():
        module.register_flop_formula(op)(formula)
    # A counter that is counting already took its copy of the registry before.
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if hasattr(counter, "flop_registry"):
            counter.flop_registry.update({op: module.flop_registry[op] for op in ops})
