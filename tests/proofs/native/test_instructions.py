"""A CPU kernel that takes over 3 % more instructions than its committed budget fails, by name."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from tests.proofs.native import instructions, test_driver

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
def driver(tmp_path_factory) -> Path:
    return instructions.build(tmp_path_factory.mktemp("counted"))


def test_no_kernel_takes_more_instructions(budget, driver) -> None:
    counts = instructions.measure(driver)
    assert set(counts) == set(budget)
    assert not instructions.risen(budget, counts)


def test_a_wasted_pass_is_caught(budget, driver, tmp_path) -> None:
    """A row's statistics taken twice: the norm's count rises, and no other kernel's."""
    sources = tmp_path / "csrc"
    shutil.copytree(test_driver.SOURCES, sources)
    header = sources / "cpu" / "ops" / "norm.h"
    once = "      const RowStatistics s = row_statistics(x, p.channels, p.layer_norm, p.eps);\n"
    twice = (
        "      volatile float wasted = row_statistics(x, p.channels, p.layer_norm, p.eps).rstd;\n      (void)wasted;\n"
    )
    assert header.read_text().count(once) == 1
    header.write_text(header.read_text().replace(once, twice + once))
    (slower,) = test_driver.compile_all(tmp_path, [sources / "cpu/isa/generic.cpp"], *instructions.FLAGS, root=sources)
    others = [str(p) for p in driver.parent.glob("*.o") if p.stem != "generic"]
    counts = instructions.count(test_driver.link(tmp_path, [slower, *others]), "generic", "float32")
    (line,) = instructions.risen({"generic float32": budget["generic float32"]}, {"generic float32": counts})
    assert line.startswith("norm in the unit generic float32")


def test_a_rise_of_four_percent_is_named(budget) -> None:
    counts = copy.deepcopy(budget)
    counts["avx2 bfloat16"]["gelu"] = round(1.04 * budget["avx2 bfloat16"]["gelu"])
    (line,) = instructions.risen(budget, counts)
    assert line.startswith("gelu in the unit avx2 bfloat16")
