"""The CPU library with its AMX unit on emulated tiles (tests/proofs/native/tiles.h), for machines with AVX512-BF16.

python -m tests.proofs.cpu.emulated FOLDER [PYTEST ARGUMENTS]    any tests, with that unit of the library in FOLDER
"""

import sys
from pathlib import Path

import pytest
import torch

from internvit.ops.backends import native
from tests.support.building import ROOT, setup_module

UNIT = "amx_emulated"


def build(folder: Path) -> None:
    """The library as setup.py builds it, but for one unit."""
    setup = setup_module()
    plan = setup.cpu_plan()
    flags = plan.compiles.pop(setup.CSRC / "cpu" / "isa" / "avx512_bf16.cpp")
    plan.compiles[ROOT / "tests" / "proofs" / "native" / f"{UNIT}.cpp"] = flags
    setup.build_library(plan, folder)


if __name__ == "__main__":
    native.FOLDER = Path(sys.argv[1])
    assert native.unavailable_reason("internvit_cpu") is None
    torch.ops.internvit_cpu.use_instruction_set(UNIT)
    sys.exit(pytest.main(sys.argv[2:]))
