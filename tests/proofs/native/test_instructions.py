"""A CPU kernel that takes over 3 % more instructions than its committed budget fails, by name."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from tests.proofs.native import cpu_driver, instructions, test_driver

pytestmark = [
    *test_driver.pytestmark,
    pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind (a Debian package)"),
]


@pytest.fixture(scope="module")
def budget() -> dict[str, dict[str, int]]:
    found = json.loads(instructions.BUDGET.read_text())
    if found["compiler"] != instructions.compiler():
        pytest.skip(f"the budget was taken with {found['compiler']}, here is {instructions.compiler()}")
    return found["instructions"]


@pytest.fixture(scope="module")
def driver(build_folder) -> Path:
    return cpu_driver.build(build_folder)


@pytest.mark.sampled(2)
def test_no_kernel_takes_more_instructions(budget, driver, tmp_path) -> None:
    counts = instructions.measure(driver, tmp_path)
    assert set(counts) == set(budget)
    assert not instructions.risen(budget, counts)


@pytest.mark.sampled(6)  # 16 s, half of it compiling
def test_a_wasted_pass_is_caught(budget, build_folder, tmp_path) -> None:
    """A row's statistics taken twice: the norm's count rises, and no other kernel's.

    In the AVX2 unit, which compiles in a third of the generic unit's time.
    """
    sources = tmp_path / "csrc"
    shutil.copytree(cpu_driver.SOURCES, sources)
    header = sources / "cpu" / "ops" / "norm.h"
    once = "      const RowStatistics s = row_statistics(x, p.channels, p.layer_norm, p.eps);\n"
    twice = (
        "      volatile float wasted = row_statistics(x, p.channels, p.layer_norm, p.eps).rstd;\n      (void)wasted;\n"
    )
    assert header.read_text().count(once) == 1
    header.write_text(header.read_text().replace(once, twice + once))
    slower = cpu_driver.compile_all(build_folder, [sources / "cpu/isa/avx2.cpp"], root=sources)
    rest = [p for p in (*cpu_driver.INSTRUMENTED, *cpu_driver.VECTOR_UNITS) if p.stem != "avx2"]
    driver = cpu_driver.link(tmp_path / "driver", [*slower, *cpu_driver.compile_all(build_folder, rest)])
    counts = instructions.count(driver, "avx2", "float32", tmp_path)
    (line,) = instructions.risen({"avx2 float32": budget["avx2 float32"]}, {"avx2 float32": counts})
    assert line.startswith("norm in the unit avx2 float32")


def test_a_rise_of_four_percent_is_named(budget) -> None:
    counts = copy.deepcopy(budget)
    counts["avx2 bfloat16"]["gelu"] = round(1.04 * budget["avx2 bfloat16"]["gelu"])
    (line,) = instructions.risen(budget, counts)
    assert line.startswith("gelu in the unit avx2 bfloat16")
