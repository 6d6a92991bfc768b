"""The CPU library with its AMX unit on emulated tiles (tests/proofs/native/tiles.h), for machines with AVX512-BF16.

python -m tests.proofs.cpu.emulated FOLDER [PYTEST ARGUMENTS]    any tests, with that unit of the library in FOLDER
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internvit.ops.backends import native
from tests.support import ROOT
from tests.support.building import BuildFolder, built_by_setup, setup_module

UNIT = "amx_emulated"


def build(folder: BuildFolder) -> Path:
    """The library as setup.py builds it, but for one unit."""
    return folder.once("emulated/internvit_cpu.so", lambda library: _link_library(folder, library))


def _link_library(folder: BuildFolder, library: Path) -> None:
    setup = setup_module()
    plan = setup.cpu_plan()
    flags = plan.compiles.pop(setup.CSRC / "cpu" / "isa" / "avx512_bf16.cpp")
    plan.compiles[ROOT / "tests" / "proofs" / "native" / f"{UNIT}.cpp"] = [*flags, "-O1"]  # as cpu_driver has it
    setup.write_schemas(plan.name, library.parent / "schemas.h")
    installed = ROOT / "build" / plan.name / "schemas.h"
    same = installed.exists() and installed.read_text() == (library.parent / "schemas.h").read_text()

    def flags_of(source: Path, command: list[str]) -> list[str]:
        """Bindings include schemas.h: that of setup.py's build where it says the same."""
        plain = setup.CSRC / "cpu" / "torch" not in source.parents or (same and built_by_setup(source, command))
        return command if plain else [*command, f"-I{library.parent}"]

    objects = folder.all_compiled((source, flags_of(source, command)) for source, command in plan.compiles.items())
    subprocess.run([*plan.link, *objects, "-o", str(library), *plan.link_end], check=True)


if __name__ == "__main__":
    native.FOLDER = Path(sys.argv[1])
    assert native.unavailable_reason("internvit_cpu") is None
    torch.ops.internvit_cpu.use_instruction_set(UNIT)
    sys.exit(pytest.main(sys.argv[2:]))
