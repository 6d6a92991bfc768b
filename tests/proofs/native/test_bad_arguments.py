"""Raw ops with one argument wrong at a time: an error that names it, never a crash; and their schemas are Python's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internvit.ops.backends import native, schemas
from tests.support import ROOT

LIBRARIES = ("internvit_cpu", "internvit_cuda")


def attack(namespace: str, library: Path, seed: int, parts: int = 5) -> None:
    """One wrong call in `parts`, in a process of its own: a crash is a failure that names the call."""
    command = [
        sys.executable,
        "-m",
        "tests.proofs.native.bad_arguments",
        namespace,
        str(library),
        str(seed),
        str(parts),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines() or [""]
    assert done.returncode in (0, 1), f"status {done.returncode} in the call: {lines[-1]}\n{done.stderr[-2000:]}"
    calls = re.search(r"^(\d+) calls$", done.stdout, re.MULTILINE)
    assert calls, done.stderr[-2000:]
    assert int(calls[1]) > 1500 / parts
    assert done.returncode == 0, done.stdout[calls.start() :][:4000]


@pytest.mark.sampled(2)
@pytest.mark.skipif(
    native.unavailable_reason("internvit_cpu") is not None, reason=str(native.unavailable_reason("internvit_cpu"))
)
@pytest.mark.parametrize("parts", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_the_cpu_library_survives_bad_arguments(parts: int, seed: int) -> None:
    attack("internvit_cpu", native.FOLDER / "internvit_cpu.so", seed, parts)


@pytest.mark.parametrize("library", LIBRARIES)
def test_each_library_registered_what_python_says(library: str) -> None:
    if native.unavailable_reason(library) is not None:
        pytest.skip(str(native.unavailable_reason(library)))
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{library}::")}
    assert registered == schemas.schemas(library).keys()
    for name, text in schemas.schemas(library).items():
        schema = getattr(getattr(torch.ops, library), name).default._schema
        assert schema == torch._C.parse_schema(f"{library}::{text}"), "made from other sources: build it anew"
        keys = ("CUDA",) if library == "internvit_cuda" else ("CPU", "CompositeExplicitAutograd")
        assert any(torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{name}", key) for key in keys), name


def test_the_schemas_come_from_the_ops() -> None:
    """A raw op takes what the public op takes, without the backend's name."""
    public = torch.ops.internvit.rms_norm.default._schema
    raw = torch._C.parse_schema(schemas.schemas("internvit_cpu")["rms_norm"])
    assert [(a.name, str(a.type)) for a in raw.arguments] == [(a.name, str(a.type)) for a in public.arguments[:-1]]
    assert all("backend" not in schema for library in LIBRARIES for schema in schemas.schemas(library).values())
