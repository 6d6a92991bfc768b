"""Every kernel that whole models launch compiles for every target, without spills and within the committed budget.

No GPU is needed. `python -m tests.proofs.triton.test_models_compile` writes the budget anew: read the difference before
you commit it. It also writes for which code all of that was seen on the targets of an ordinary run (`compiled.json`):
such a run compiles a sixteenth of the same launches of the same code, and all of any other.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import triton

from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools.static_profile import failures
from tests.support import ROOT

BUDGET = Path(__file__).with_name("budget.json")
COMPILED = Path(__file__).with_name("compiled.json")
PARTS = 16
LIMITS = ("registers", "shared_bytes", "stack_bytes")
LOOP = ("issue", "tensor", "exp", "products")
"""Of a main loop with matrix products, where the target's figures are known."""
BUDGETED = (
    "448px.* bfloat16: ((eval|train|int8|float8)(, Triton GEMMs)?|train, (DropPath|packed)|eval, column sums"
    "|optimize_for_inference(, Triton GEMMs, norms folded)?)$"
)
FAST = ("sm_90", "gfx942")
"""Of which an ordinary run compiles for one, by its seed: the launches of all models take 20 s of a core, and compiling
them 75."""

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
    for row in (row for row in rows if budgeted(row) and "registers" in row):
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


def write_compiled(folder):
    COMPILED.write_text(json.dumps({arch: check_launches(arch, folder) for arch in FAST}, indent=1) + "\n")


def kernels():
    """The names of all kernels in the sources, without those of the tools and the one that `launch` starts to find out
    whether Triton works here: no model launches it."""
    folder = ROOT / "kernels"
    texts = [path.read_text() for path in folder.rglob("*.py") if folder / "tools" not in path.parents]
    return {name for text in texts for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)} - {
        "probe_kernel"
    }


LAUNCHING = ("kernels", "internvit/ops", "internvit/model", "internvit/inference", "internvit/upstream")
"""The folders whose code launches come from: a row's name does not tell all of a launch."""


def digest(rows, root=ROOT):
    """Of all that the machine code of these launches and what is asked of it depend on."""
    found = hashlib.sha256(triton.__version__.encode() + BUDGET.read_bytes() + Path(__file__).read_bytes())
    for path in sorted(path for folder in LAUNCHING for path in (root / folder).rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + path.read_bytes())
    found.update("\n".join(sorted(f"{key(row)} {row['modes']}" for row in rows)).encode())
    return found.hexdigest()[:16]


def check_launches(arch, folder, part=None):
    """All that models launch, or of code that was seen whole the given part; returns the code's digest."""
    options = ("--quick", "--arch", arch)
    rows = profile(folder, *options, *(() if part is None else ("--part", f"{part}/{PARTS}")))
    code = digest(rows)
    if part is not None and code != json.loads(COMPILED.read_text()).get(arch):
        warnings.warn(f"{COMPILED.name} is of other code, so that all launches compile: make budgets", stacklevel=1)
        rows, part = profile(folder, *options), None
    compiled = [row for row in rows if "registers" in row or "error" in row]
    assert len(compiled) == len(rows if part is None else rows[part::PARTS])
    found = [failure for row in compiled for failure in failures(row)]
    assert not found, "\n".join(found)
    assert {row["kernel"] for row in rows} == kernels()
    over = list(over_budget(rows))
    assert not over, "\n".join(over)
    return code


@pytest.mark.sampled(4)
@pytest.mark.parametrize("arch", FAST)
def test_every_launch_compiles_within_budget(arch, tmp_path, pytestconfig):
    check_launches(arch, tmp_path, part=pytestconfig.option.seed // len(FAST) % PARTS)


def test_code_that_changed_has_another_digest(tmp_path):
    rows = [{"arch": "sm_90", "kernel": "norm_kernel", "config": "bf16 C=1024", "modes": ["eval"]}]
    copy = tmp_path / "checkout"
    for folder in LAUNCHING:
        shutil.copytree(ROOT / folder, copy / folder)
    seen = {digest(rows)}
    assert {digest(rows, copy)} == seen
    for changed in ("kernels/norm.py", "internvit/model/block.py"):
        (copy / changed).write_text((copy / changed).read_text() + "\n")
        seen.add(digest(rows, copy))
    seen.add(digest([*rows, {**rows[0], "config": "bf16 C=3200"}]))
    seen.add(digest([{**rows[0], "modes": ["train"]}]))
    assert len(seen) == 5


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_launch_compiles_for_every_target(arch, tmp_path):
    code = check_launches(arch, tmp_path)
    assert arch not in FAST or code == json.loads(COMPILED.read_text())[arch], "make budgets renews compiled.json"


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_other_dtypes_compile(arch, tmp_path):
    rows = profile(tmp_path, "--quick", "--arch", arch, "--dtype", "float16", "float32")
    found = [failure for row in rows for failure in failures(row)]
    assert not found, "\n".join(found)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_budget(profile(Path(folder), "--quick", "--only", BUDGETED))
        write_compiled(Path(folder))
