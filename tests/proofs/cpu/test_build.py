"""Which units setup.py gives the CPU library, and that a library with some of them runs."""

import shutil
import subprocess
import sys

import pytest
import torch

from internvit.ops.backends import native
from tests.support import CPU_UNITS, ROOT
from tests.support.building import BuildFolder, setup_module

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler (c++)")


@pytest.fixture
def build(monkeypatch):
    """setup.py, with no choice of units."""
    monkeypatch.delenv("INTERNVIT_CPU_UNITS", raising=False)
    return setup_module()


def units(build) -> list[str]:
    return build.chosen_units("c++")


def test_every_unit_by_default(build) -> None:
    assert sorted(units(build)) == CPU_UNITS or units(build) == ["generic"], "x86-64 has them all"


def test_named_units_and_the_generic_one(build, monkeypatch) -> None:
    if units(build) == ["generic"]:
        pytest.skip("this architecture has the generic unit alone")
    monkeypatch.setenv("INTERNVIT_CPU_UNITS", "avx512;avx2")
    assert units(build) == ["generic", "avx2", "avx512"]
    monkeypatch.setenv("INTERNVIT_CPU_UNITS", "avx2, avx3")
    with pytest.raises(RuntimeError, match=r"INTERNVIT_CPU_UNITS: expected 'native' or some of .*, got 'avx3'"):
        units(build)


def test_native_is_what_this_machine_would_choose(build, monkeypatch) -> None:
    if reason := native.unavailable_reason("internvit_cpu"):
        pytest.skip(reason)
    best = torch.ops.internvit_cpu.instruction_sets().split()[-1]
    monkeypatch.setenv("INTERNVIT_CPU_UNITS", "native")
    found = units(build)
    assert found[0] == "generic"
    assert best in found[-2:]
    assert len(found) <= 2 + (best in ("amx", "avx512") or "amx" in found)


def test_the_unit_that_a_native_library_never_uses_compiles_at_o1_there_alone(build, monkeypatch) -> None:
    generic = build.CSRC / "cpu/isa/generic.cpp"
    assert "-O1" not in build.cpu_plan().compiles[generic]
    monkeypatch.setenv("INTERNVIT_CPU_UNITS", "native")
    compiles = build.cpu_plan().compiles
    units = [path for path in compiles if path.parent == generic.parent and path.stem != "dispatch"]
    assert [path for path in units if "-O1" in compiles[path]] == ([generic] if len(units) > 1 else [])


@pytest.mark.sampled(2)  # 6 s
def test_a_library_of_some_units_runs_the_best_of_them(build, build_folder: BuildFolder, monkeypatch, tmp_path) -> None:
    if reason := native.unavailable_reason("internvit_cpu"):
        pytest.skip(reason)
    best = torch.ops.internvit_cpu.instruction_sets().split()[-1]
    monkeypatch.setenv("INTERNVIT_CPU_UNITS", best)
    plan = build.cpu_plan()
    if not (ROOT / "build" / plan.name / "schemas.h").exists():
        pytest.skip("links what setup.py compiled here")
    objects = build_folder.all_compiled(plan.compiles.items())
    library = tmp_path / "internvit_cpu.so"
    subprocess.run([*plan.link, *objects, "-o", str(library), *plan.link_end], check=True)
    code = f"""
import torch
from internvit.ops.backends import native
from pathlib import Path
native.FOLDER = Path({str(tmp_path)!r})
import internvit
x = torch.randn(3, 257, 96)
torch.testing.assert_close(internvit.ops.rms_norm(x, x[0, 0], backend="cpu"), torch.rms_norm(x, (96,), x[0, 0], 1e-6))
print(torch.ops.internvit_cpu.instruction_sets())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(dict.fromkeys(["generic", best]))
