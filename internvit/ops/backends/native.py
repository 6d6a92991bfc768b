"""Loads the compiled libraries `internvit_cpu` and `internvit_cuda` when an op first needs one.

They define raw ops in namespaces of their own name (two definers of one namespace override each other by import order)
and are built on torch's stable ABI, so that one binary serves every Python and every torch >= 2.10.
"""

import functools
from pathlib import Path

import torch

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
