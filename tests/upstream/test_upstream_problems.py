"""docs/upstream-problems.md names tests that exist, and at least one for each problem."""

import re

from tests.support import ROOT


def test_every_problem_names_its_proof() -> None:
    rows = [line for line in (ROOT / "docs/upstream-problems.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows) > 10
    for row in rows[1:]:
        proofs = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert proofs, row
        for file, name in proofs:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
