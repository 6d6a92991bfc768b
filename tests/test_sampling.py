"""Families marked `sampled(n)`: each run has a part of them that misses no value, and n runs have all of them."""

import os
import subprocess
import sys
from collections import Counter
from itertools import product

import pytest

from tests.ops.shapes import norm_table
from tests.support import ROOT
from tests.support.sampling import parts

TABLES = {
    "norms": [
        dict(zip(("rows", "width", "distribution", "dtype"), row, strict=True), backend=backend, kind=kind)
        for kind, row, backend in product("rl", norm_table(), ("reference", "cpu"))
    ],
    "product": [dict(zip("abc", values, strict=True)) for values in product(range(5), range(4), ([], {"d": 0}, None))],
}


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_a_part_has_every_value_and_its_share(table, count) -> None:
    family = TABLES[table]
    chosen = parts(family, count)
    sizes = Counter(chosen)
    assert sorted(sizes) == list(range(count)), "n seeds in a row run everything"
    assert max(sizes.values()) - min(sizes.values()) <= 2
    for part in range(count):
        mine = [test for test, p in zip(family, chosen, strict=True) if p == part]
        for name in family[0]:
            assert {str(test[name]) for test in mine} == {str(test[name]) for test in family}, (part, name)


def test_values_of_a_dict_count_each() -> None:
    flat = [dict(zip("abc", values, strict=True)) for values in product(range(3), range(4), range(2))]
    assert parts([{"case": case} for case in flat], 3) == parts(flat, 3)


def test_one_parameter_is_dealt_out_in_turn() -> None:
    assert parts([{"bug": bug} for bug in "abcde"], 2) == [0, 1, 0, 1, 0]


def test_a_family_of_one_runs_with_one_seed_in_n() -> None:
    assert parts([{}], 3) == [0]


def test_values_without_a_hash_count_as_others_do() -> None:
    things = [({i: []},) for i in range(6)]
    family = [{"thing": thing, "dtype": dtype} for thing, dtype in product(things, "xyz")]
    numbered = [{"thing": things.index(t["thing"]), "dtype": t["dtype"]} for t in family]
    assert parts(family, 3) == parts(numbered, 3)


@pytest.mark.sampled(6)  # three processes of pytest, 10 s of a core
def test_workers_run_the_same_part(tmp_path) -> None:
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_family.py").write_text(
        "import pytest\n@pytest.mark.sampled(40)\n@pytest.mark.parametrize('i', range(80))\ndef test_one(i): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-n", "2", "-m", "not slow", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "2 passed" in done.stdout, done.stdout  # of two seeds drawn at random one in forty is the same part
