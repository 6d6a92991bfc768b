"""The suite can fail: bugs, planted one at a time in a copy of the package, are each caught by a part of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from internvit.kernels.tools.static_profile import failures
from tests.proofs.triton.test_models_compile import profile
from tests.support import ROOT

BUGS = {
    "sign flip": (
        "norm.py",
        "tl.fma(b_x_hat, -b_along, b_scaled)",
        "tl.fma(b_x_hat, b_along, b_scaled)",
        ("test_norms.py", "rows:3-channels:384"),
    ),
    "missing mask": (
        "common/rows.py",
        "m_rows[:, None] & (o_cols < C)[None, :]",
        "m_rows[:, None] & (o_cols < o_cols.shape[0])[None, :]",
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
    "product of the last depth left out": (
        "linear.py",
        "for i_k in range(0, K, BLOCK_K):",
        "for i_k in range(0, K - BLOCK_K + 1, BLOCK_K):",
        ("test_linear.py", "channels:40"),
    ),
    "column beyond the last": (
        "linear.py",
        "o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]\n    m_n = o_n < N",
        "o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]\n    m_n = o_n <= N",
        ("test_linear.py", "out:72"),
    ),
    "piece of fewer columns counted whole": (
        "norm_linear.py",
        "tl.minimum(N - i_piece * b_y.shape[1], b_y.shape[1])",
        "b_y.shape[1]",
        ("test_norm_linear.py", "stats-layer_norm and bfloat16-massive"),
    ),
    "deviation of the pieces' means left out": (
        "norm_linear.py",
        "mask=m_tile, other=0.0), 0) + b_between",
        "mask=m_tile, other=0.0), 0)",
        ("test_norm_linear.py", "stats-layer_norm and bfloat16-massive"),
    ),
    "key beyond the last": (
        "attention/scores.py",
        'tl.where((o_n < N)[None, :], b_s, float("-inf"))',
        "b_s",
        ("test_attention.py", "tokens:17"),
    ),
    "query beyond the last in a column's sum": (
        "attention/column_sums.py",
        'mask=o_m < N, other=float("inf"))  # exp2(-inf) drops queries beyond N',
        "mask=o_m < N, other=0.0)",
        ("test_attention_column_sums.py", "float64 and tokens:17"),
    ),
    "sequence that ends a token early": (
        "attention/tiles.py",
        "N = tl.load(p_cu_kept + i_b + 1) - i_first",
        "N = tl.load(p_cu_kept + i_b + 1) - i_first - 1",
        ("test_attention_packed.py", "float64 and False and lengths2"),
    ),
    "key of the next sequence": (
        "attention/forward.py",
        "D, BLOCK_N, LAST_AGAIN,",
        "D, BLOCK_N, False,",
        ("test_attention_packed.py", "neighbours and nan and 64"),
    ),
    "keys at the place of the queries": (
        "attention/tiles.py",
        "i_walked = tl.where(N_walked == 0, 0, i_first)",
        "i_walked = tl.where(N_walked == 0, 0, i_kept)",
        ("test_attention_keys.py", "packs and 64"),
    ),
    "as many keys as queries": (
        "attention/tiles.py",
        "N_walked = tl.where(beyond, 0, tl.load(p_cu_walked + i_b + 1) - i_first)",
        "N_walked = N",
        ("test_attention_keys.py", "packs and 64"),
    ),
    "division by no key": (
        "attention/forward.py",
        "b_divisor = tl.where(b_sum == 0, 1.0, b_sum)",
        "b_divisor = b_sum",
        ("test_attention_keys.py", "packs and 64"),
    ),
}


def run_suite(root: Path, file: str, name: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-k", name, file]
    folder = root / "tests/proofs/triton/interpreted"
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package, its kernels and tests."""
    root = tmp_path / "copy"
    for folder in ("internvit", "kernels", "tests"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def plant(file, right, wrong):
    text = file.read_text()
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
    file.write_text(text.replace(right, wrong))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, copy):
    file, right, wrong, where = BUGS[bug]
    plant(copy / "kernels" / file, right, wrong)
    result = run_suite(copy, *where)
    output = f"{result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert result.returncode == 1, f"the suite did not fail, or died:\n{output}"
    assert "1 failed" in result.stdout, output


@pytest.mark.sampled(4)  # all launches of the models, 8 s
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted, not compiled")
def test_planted_early_return_does_not_compile(copy, tmp_path):
    """Triton compiles what follows a `return` inside a static `if`, with a pointer that is None: only models that leave
    LayerScale or DropPath out launch such a kernel."""
    plant(
        copy / "kernels/layer_scale_residual.py",
        """        b_scale = tl.full([o_rows.shape[0]], 1.0, tl.float32)
    else:
        b_scale = tl.load(p_row_scale + o_rows // rows_per_image, mask=m_rows, other=0.0).to(tl.float32)
    return b_scale
""",
        """        return tl.full([o_rows.shape[0]], 1.0, tl.float32)
    return tl.load(p_row_scale + o_rows // rows_per_image, mask=m_rows, other=0.0).to(tl.float32)
""",
    )
    arguments = ("--quick", "--arch", "sm_90", "--only", "300m-448px bfloat16: train$")
    rows = profile(tmp_path, *arguments, root=copy, PYTHONPATH=str(copy))
    found = {row["kernel"]: list(failures(row)) for row in rows}
    assert "does not compile: CompilationError" in found["layer_scale_residual_norm_backward_kernel"][0]
    assert not found["attention_kernel"]
