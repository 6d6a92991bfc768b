"""The AMX unit where there is no AMX: every test of a unit and of an op, on emulated tiles, in a process of its own."""

import re
import subprocess
import sys

import pytest
import torch

from internvit.ops.backends import native
from tests.proofs.cpu import emulated
from tests.support import ROOT

MISSING = native.unavailable_reason("internvit_cpu")
UNITS = "" if MISSING else torch.ops.internvit_cpu.instruction_sets()
pytestmark = [
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif("avx512_bf16" not in UNITS, reason=f"needs AVX512-BF16 besides tiles; this machine has {UNITS}"),
]


@pytest.fixture(scope="module")
def folder(build_folder):
    return emulated.build(build_folder).parent


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "arguments",
    [
        ("tests/proofs/cpu/test_units.py", "tests/proofs/cpu/test_unit_linears.py", "-k", emulated.UNIT),
        ("tests/ops/test_every_op.py", "-k", "cpu and attention"),
        ("tests/inference/test_int8_fused.py", "tests/ops/test_int8.py", "-k", "fused or (test_linear and cpu)"),
    ],
    ids=["units", "attention", "int8"],
)
def test_amx_unit(folder, arguments: tuple[str, ...], request) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.proofs.cpu.emulated",
        str(folder),
        "-q",
        "--seed",
        str(request.config.option.seed),
        "-m",
        request.config.option.markexpr,
    ]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) > 20
    assert "skipped" not in done.stdout
