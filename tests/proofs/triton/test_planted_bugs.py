"""The suite can fail: four bugs, planted one at a time in a copy of the package, are each caught by a part of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

BUGS = {
    "sign flip": (
        "norm.py",
        "b_inner = b_g - b_x_hat *",
        "b_inner = b_g + b_x_hat *",
        ("test_norms.py", "rows:3-channels:384"),
    ),
    "missing mask": (
        "common/rows.py",
        "m_rows[:, None] & (o_cols < C)[None, :]",
        "m_rows[:, None] & (o_cols < BLOCK_C)[None, :]",
        ("test_norms.py", "rows:3-channels:40"),
    ),
    "int32 offset": (
        "common/rows.py",
        "tl.cast(i_tile, tl.int64) * ROWS",
        "tl.cast(i_tile, tl.int32) * ROWS",
        ("test_offsets.py", "rows_far_apart"),
    ),
    "dropped partial row": (
        "common/rows.py",
        "mask=(o_p < P)[:, None]",
        "mask=(o_p < P - 1)[:, None]",
        ("test_norms.py", "rows:257-channels:384"),
    ),
    "key beyond the last": (
        "attention/tiles.py",
        'tl.where((o_n < N)[None, :], b_s, float("-inf"))',
        "b_s",
        ("test_attention.py", "tokens:17"),
    ),
}


def run_suite(root: Path, file: str, name: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-k", name, file]
    folder = root / "tests/proofs/triton/interpreted"
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, tmp_path):
    file, right, wrong, where = BUGS[bug]
    for folder in ("internvit", "kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "kernels" / file
    text = source.read_text()
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
    source.write_text(text.replace(right, wrong))
    result = run_suite(tmp_path, *where)
    output = f"{result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert result.returncode == 1, f"the suite did not fail, or died:\n{output}"
    assert "1 failed" in result.stdout, output
