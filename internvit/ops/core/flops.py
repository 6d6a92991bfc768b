"""FLOP formulas of the ops that multiply matrices, for `torch.utils.flop_counter.FlopCounterMode`.

That module imports triton (0.11 s), so the formulas are registered by the first call of an op after somebody else has
imported it.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from internvit.ops.core.namespace import NAMESPACE

_COUNTER = "torch.utils.flop_counter"
FORMULAS: dict[str, Callable[..., int]] = {}
"""op -> FLOPs from its arguments, tensors given as their shapes; filled by the op files."""

_registered = False


def register_when_counted() -> None:
    """Registers the formulas once, if torch's FLOP counter is there to use them."""
    global _registered
    if _registered or _COUNTER not in sys.modules:
        return
    _registered = True
    module: Any = sys.modules[_COUNTER]
    ops = {getattr(getattr(torch.ops, NAMESPACE), name): formula for name, formula in FORMULAS.items()}
    for op, formula in ops.items():
        module.register_flop_formula(op)(formula)
    # A counter that is counting already took its copy of the registry before.
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if hasattr(counter, "flop_registry"):
            counter.flop_registry.update({op: module.flop_registry[op] for op in ops})
