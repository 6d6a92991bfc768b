"""Every op of this library in PyTorch's own."""

from collections.abc import Callable
from typing import Any

import torch

import internvit.ops  # noqa: F401 (registers them)
from internvit.ops.backends.registry import usable
from internvit.ops.core.registration import OPS, Op

_ATEN = torch.ops.aten
_KEPT = (
    _ATEN.linear.default,  # else of one without bias a product with a copy of the weight for each image
    _ATEN.scaled_dot_product_attention.default,
    _ATEN.rms_norm.default,
    _ATEN.upsample_bicubic2d.vec,
    _ATEN.upsample_bicubic2d.default,
)


LIBRARIES = ("cpu", "cuda")
"""The backends that are a compiled library, whose ops a process without Python can call."""


def decompositions(backend: str | None = None) -> dict[Any, Callable[..., Any]]:
    """What `ExportedProgram.run_decompositions` takes to leave no op of namespace `internvit` in a program.

    Each op becomes its formula, backward ops their reference implementation. PyTorch's ops are decomposed as by
    default, but for Linear, attention, RMSNorm and resizing, which other runtimes have as one op each.

    Args:
        backend: "cpu" or "cuda" keeps the kernels of that compiled library: each op becomes the library's own,
            `internvit_cpu::NAME`, which a process without Python has once it has loaded internvit_cpu.so. What the
            CUDA library leaves to others, attention among it, is PyTorch's.

    Raises:
        ValueError: another backend.
        RuntimeError: the library is not there.

    Returns:
        op -> a function of its arguments.

    Example:
        >>> program = torch.export.export(model, (pixels,)).run_decompositions(internvit.export.decompositions())
    """
    if backend not in (None, *LIBRARIES):
        raise ValueError(f"decompositions: backend must be 'cpu', 'cuda' or None, got {backend!r}")
    if backend is not None:
        usable(backend)
    table: dict[Any, Callable[..., Any]] = dict(torch.export.default_decompositions())
    for kept in _KEPT:
        table.pop(kept, None)
    return table | {op.overload: op.decompose if backend is None else _in_backend(op, backend) for op in OPS.values()}


def _in_backend(op: Op, backend: str) -> Callable[..., Any]:
    return lambda *args: op.run(*args[:-1], backend)
