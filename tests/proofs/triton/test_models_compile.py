"""Every kernel that whole models launch compiles for every target, without spills and within the committed budget.

No GPU is needed. `python -m tests.proofs.triton.test_models_compile` writes the budget anew: read the difference before
you commit it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools.static_profile import failures
from tests.support import ROOT

BUDGET = Path(__file__).with_name("budget.json")
LIMITS = ("registers", "shared_bytes", "stack_bytes")
BUDGETED = "448px.* bfloat16: ((eval|train|int8|float8)(, Triton GEMMs)?|train, DropPath|optimize_for_inference)$"
FAST = ("sm_90", "gfx942")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process, not compiled"
)


def profile(folder, *arguments, root=ROOT, **environment):
    """The static profile's rows, from a process of its own: a model run for a GPU that is not there fixes the choice of
    backends for the process that does it."""
    out = folder / "rows.json"
    command = [sys.executable, "-m", "internvit.kernels.tools.static_profile", "--json", str(out), *arguments]
    result = subprocess.run(
        command, cwd=root, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(out.read_text())


def key(row):
    return f"{row['arch']} {row['kernel']}: {row['config']}"


def budgeted(row):
    return any(re.search(BUDGETED, mode) for mode in row["modes"])


def over_budget(rows):
    """The rows above the committed budget, and those without one; another Triton allocates registers its own way."""
    committed = json.loads(BUDGET.read_text())
    if triton.__version__ != committed["triton"]:
        return
    for row in filter(budgeted, rows):
        allowed = committed["rows"].get(key(row))
        if allowed is None:
            yield f"{key(row)}: has no budget; run python -m tests.proofs.triton.test_models_compile"
        else:
            limits = zip(LIMITS, allowed, strict=True)
            yield from (f"{key(row)}: {name} {row[name]} > {limit}" for name, limit in limits if row[name] > limit)


def kernels():
    """The names of all kernels in the sources, without those of the tools and the one that `launch` starts to find out
    whether Triton works here: no model launches it."""
    folder = ROOT / "kernels"
    texts = [path.read_text() for path in folder.rglob("*.py") if folder / "tools" not in path.parents]
    return {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)} - {
        "probe_kernel"
    }


@pytest.mark.parametrize(
    "arch", [arch if arch in FAST else pytest.param(arch, marks=pytest.mark.slow) for arch in TARGETS]
)
def test_every_launch_compiles_within_budget(arch, tmp_path):
    rows = profile(tmp_path, "--arch", arch)
    found = [failure for row in rows for failure in failures(row)]
    assert not found, "\n".join(found)
    assert {row["kernel"] for row in rows} == kernels()
    over = list(over_budget(rows))
    assert not over, "\n".join(over)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_other_dtypes_compile(arch, tmp_path):
    rows = profile(tmp_path, "--arch", arch, "--dtype", "float16", "float32")
    found = [failure for row in rows for failure in failures(row)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        profiled = profile(Path(folder), "--only", BUDGETED)
    lines = [f"  {json.dumps(key(row))}: {json.dumps([row[k] for k in LIMITS])}" for row in profiled]
    text = ",\n".join(sorted(lines))
    BUDGET.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "rows": {{\n{text}\n }}\n}}\n')
