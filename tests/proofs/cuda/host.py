"""Compiles csrc/cuda for the host, bindings and bodies: raw ops `internvit_cuda_host` on CPU tensors.

    python -m tests.proofs.cuda.host LIBRARY [PYTEST ARGUMENTS]    any tests, with those ops as backend `cuda` on CPU

`tests/proofs/native/cuda/cuda_host.h` gives g++ the names that nvcc knows and runs a block's threads as fibers; the
sources are the very files that nvcc compiles.
"""

import dataclasses
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internvit.ops.backends import registry
from internvit.ops.core.registration import OPS
from tests.support import ROOT
from tests.support.building import BuildFolder, setup_module

SOURCES = ROOT / "csrc"
HARNESS = ROOT / "tests" / "proofs" / "native" / "cuda"
UNITS = ("float32", "bfloat16", "bfloat16_float32", "float16", "float16_float32")
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]  # `#pragma unroll` is nvcc's
# Not optimised: that compiles in 13 s instead of 28, and what runs is small: 12 s instead of 11.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-DINTERNVIT_CUDA_HOST", *WARNINGS]


def compile_objects(folder: BuildFolder, sources: list[Path], *extra: str, root: Path = SOURCES) -> list[str]:
    command = ["c++", *FLAGS, *extra, f"-I{root}", f"-I{HARNESS}", "-x", "c++"]
    return folder.all_compiled((source, command) for source in sources)


def units(root: Path = SOURCES) -> list[Path]:
    return [root / "cuda" / "instantiate" / f"{name}.cu" for name in UNITS]


def build_library(folder: BuildFolder) -> Path:
    """The raw ops as a library for `torch.ops.load_library`."""
    return folder.once("cuda_host/internvit_cuda_host.so", lambda target: _link_library(folder, target))


def _link_library(folder: BuildFolder, library: Path) -> None:
    from torch.utils import cpp_extension

    torch_flags = [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        *(f"-isystem{p}" for p in cpp_extension.include_paths()),
    ]
    names = ["-DINTERNVIT_LIBRARY=internvit_cuda_host", "-DINTERNVIT_DEVICE_KEY=CPU", f"-I{library.parent}"]
    setup_module().write_schemas("internvit_cuda", library.parent / "schemas.h")
    objects = compile_objects(folder, [*units(), HARNESS / "cuda_host.cpp"])
    objects += compile_objects(folder, [SOURCES / "cuda" / "torch" / "bindings.cpp"], *torch_flags, *names)
    libraries = [f"-L{p}" for p in cpp_extension.library_paths()]
    link = ["c++", "-shared", *objects, *libraries, "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(link, check=True)


def as_backend(library: Path) -> registry.Backend:
    """Backend `cuda` as it is, but for where its library comes from and the tensors it takes."""
    torch.ops.load_library(str(library))
    importlib.import_module("internvit.ops.backends.cuda")
    registry.implements_all(torch.ops.internvit_cuda_host, "cuda", OPS)
    return dataclasses.replace(
        registry.BACKENDS["cuda"],
        module=None,
        unavailable_reason=lambda: None,
        unsupported_reason=registry._only(("cpu",), (torch.float32, torch.bfloat16, torch.float16)),
    )


if __name__ == "__main__":
    registry.BACKENDS["cuda"] = as_backend(Path(sys.argv[1]))
    sys.exit(pytest.main(sys.argv[2:]))
