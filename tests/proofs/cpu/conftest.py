"""Each instruction set of the CPU library in turn."""

from collections.abc import Iterator

import pytest
import torch

from internvit.ops.backends import native
from internvit.ops.backends.registry import has_implementation
from tests.support import CPU_UNITS

cpu = torch.ops.internvit_cpu
MISSING = native.unavailable_reason("internvit_cpu")
EMULATED = () if MISSING else tuple(unit for unit in cpu.instruction_sets().split() if unit.endswith("emulated"))
if MISSING is None:
    has_implementation("linear_int8", "cpu")  # asked once, of the machine's best unit, before another takes its turn


@pytest.fixture(params=(*CPU_UNITS, *EMULATED))
def unit(request: pytest.FixtureRequest) -> Iterator[str]:
    if MISSING is not None:
        pytest.skip(MISSING)
    if request.param not in cpu.instruction_sets().split():
        pytest.skip(f"this machine has no {request.param}; it has {cpu.instruction_sets()}")
    previous = cpu.use_instruction_set(request.param)
    yield request.param
    cpu.use_instruction_set(previous)
