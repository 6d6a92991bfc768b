"""Loads the compiled libraries `internvit_cpu` and `internvit_cuda` when an op first needs one.

They define raw ops in namespaces of their own name (two definers of one namespace override each other by import order)
and are built on torch's stable ABI, so that one binary serves every Python and every torch >= 2.10.
"""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from internvit.ops.backends.registry import implements

FOLDER = Path(__file__).resolve().parents[2] / "lib"


@functools.cache
def _load(library: str) -> str | None:
    """Loads `library` once; returns why it could not be loaded, None when it could."""
    path = FOLDER / f"{library}.so"
    if not path.exists():
        return (
            f"the compiled library {library} was not built; install a C++ compiler"
            f"{', nvcc and a torch of the same CUDA' if library.endswith('cuda') else ''} and reinstall from source "
            "(pip install --no-build-isolation -v ., which says why it cannot be built)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path} does not load: {error}"
    return None


unavailable_reason = _load


def register(library: str, backend: str, ops: Iterable[str]) -> None:
    """Registers as `backend` the raw ops that `library` has of the names `ops`."""
    _load(library)
    register_namespace(getattr(torch.ops, library), backend, ops)


def register_namespace(namespace: Any, backend: str, ops: Iterable[str]) -> None:
    """Registers as `backend` the ops of `namespace` that have one of the names `ops`."""
    for op in ops:
        if hasattr(namespace, op):
            implements(op, backend)(getattr(namespace, op).default)
