"""Fake implementations of the compiled libraries' ops: the checks and the output shapes of the public ops.

They serve tensors without data as well: one argument on the meta device is refused by name.
"""

import torch
from torch import Tensor

from internvit.ops.core import validation as check
from internvit.ops.core.registration import OPS

_LIBRARIES: dict[str, torch.library.Library] = {}


def register_fakes(backend: str) -> None:
    """Gives each op of the library `internvit_{backend}`, where it is loaded, its fake implementation."""
    namespace = f"internvit_{backend}"
    library = _LIBRARIES[backend] = torch.library.Library(namespace, "FRAGMENT")
    fakes = {name: op.fakes[backend] for name, op in OPS.items() if backend in op.fakes}
    if backend == "cpu":
        fakes["linear_packed"] = _linear_packed
    for name, fake in fakes.items():
        if not hasattr(getattr(torch.ops, namespace), name):
            continue
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)


def _linear_packed(
    x: Tensor, packed_weight: Tensor, out_features: int, bias: Tensor | None, residual: Tensor | None, gelu: bool
) -> Tensor:
    """Checks all but the layout of the packed weight, which its data hold."""
    op = "linear_packed"
    check.rows(op, "x", x)
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: x must be torch.bfloat16 or torch.float32, got {x.dtype}")
    if packed_weight.dtype != x.dtype:
        raise ValueError(f"{op}: packed_weight must be {x.dtype} like x, got {packed_weight.dtype}")
    check.device(op, "x", x, packed_weight=packed_weight, residual=residual)
    if packed_weight.dim() != 1:
        raise ValueError(f"{op}: packed_weight must have one dimension, got shape {check.shape_of(packed_weight)}")
    if out_features < 1:
        raise ValueError(f"{op}: out_features must be at least 1, got {out_features}")
    check.parameters(op, "x", x, out_features, "out_features", bias=bias)
    y = x.new_empty((*x.shape[:-1], out_features))
    check.like(op, "the output", y, residual=residual)
    return y
