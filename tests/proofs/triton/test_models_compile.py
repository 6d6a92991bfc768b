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
LOOP = ("issue", "tensor", "exp", "products")
"""Of a main loop with matrix products, where the target's figures are known."""
BUDGETED = (
    "448px.* bfloat16: ((eval|train|int8|float8)(, Triton GEMMs)?|train, (DropPath|packed)|eval, column sums"
    "|optimize_for_inference(, Triton GEMMs, norms folded)?)$"
)
FAST = ("sm_90", "gfx942")
"""Of which an ordinary run compiles for one, by its seed: a target takes a core's minute."""

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


def figures(row):
    """What the budget has of a row, by name."""
    return {name: row[name] for name in LIMITS} | {name: row["loop"][name] for name in LOOP if row["loop"]}


def budgeted(row):
    return any(re.search(BUDGETED, mode) for mode in row["modes"])


def over_budget(rows):
    """The rows above the committed budget, those without one, and budgets of what nothing launches any more; another
    Triton allocates registers its own way."""
    committed = json.loads(BUDGET.read_text())
    if triton.__version__ != committed["triton"]:
        return
    launched = {key(row) for row in rows}
    for name in committed["rows"]:
        if name.split()[0] in {row["arch"] for row in rows} and name not in launched:
            yield f"{name}: no model launches it; run python -m tests.proofs.triton.test_models_compile"
    for row in filter(budgeted, rows):
        allowed = committed["rows"].get(key(row))
        if allowed is None:
            yield f"{key(row)}: has no budget; run python -m tests.proofs.triton.test_models_compile"
        else:
            limits = zip(figures(row).items(), allowed, strict=True)
            yield from (f"{key(row)}: {name} {value} > {limit}" for (name, value), limit in limits if value > limit)


def write_budget(rows):
    lines = [f"  {json.dumps(key(row))}: {json.dumps(list(figures(row).values()))}" for row in rows if budgeted(row)]
    text = ",\n".join(sorted(lines))
    BUDGET.write_text(f'{{\n "triton": {json.dumps(triton.__version__)},\n "rows": {{\n{text}\n }}\n}}\n')


def kernels():
    """The names of all kernels in the sources, without those of the tools and the one that `launch` starts to find out
    whether Triton works here: no model launches it."""
    folder = ROOT / "kernels"
    texts = [path.read_text() for path in folder.rglob("*.py") if folder / "tools" not in path.parents]
    return {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)} - {
        "probe_kernel"
    }


def check_launches(arch, folder):
    rows = profile(folder, "--quick", "--arch", arch)
    found = [failure for row in rows for failure in failures(row)]
    assert not found, "\n".join(found)
    assert {row["kernel"] for row in rows} == kernels()
    over = list(over_budget(rows))
    assert not over, "\n".join(over)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("arch", FAST)
def test_every_launch_compiles_within_budget(arch, tmp_path):
    check_launches(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in TARGETS if arch not in FAST])
def test_every_launch_compiles_for_the_other_targets(arch, tmp_path):
    check_launches(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_other_dtypes_compile(arch, tmp_path):
    rows = profile(tmp_path, "--quick", "--arch", arch, "--dtype", "float16", "float32")
    found = [failure for row in rows for failure in failures(row)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        profiled = profile(Path(folder), "--quick", "--only", BUDGETED)
    write_budget(profiled)
