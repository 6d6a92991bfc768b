"""Every kernel compiles for every target without spills and within the committed budget; no GPU is needed.

`python -m tests.proofs.triton.test_static_profile` writes the budget anew: read the difference before you commit it.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import triton

from internvit.kernels.common.launch import TARGETS
from internvit.kernels.tools.static_profile import profile_all

BUDGET = Path(__file__).with_name("budget.json")
LIMITS = ("registers", "shared_bytes", "stack_bytes")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process, not compiled"
)


def key(row):
    return f"{row['arch']} {row['kernel']}: {row['config']}"


def check(rows, budget):
    failures = []
    for row in rows:
        if row["spills"]:
            failures.append(f"{key(row)}: {row['spills']} bytes spilled")
        if row["shared_bytes"] > TARGETS[row["arch"]].shared_bytes:
            failures.append(f"{key(row)}: {row['shared_bytes']} bytes of shared memory are more than the device has")
        if "attention_kernel" in row["kernel"] or "grad" in row["kernel"].removesuffix("_kernel").split("_")[1:2]:
            wide = "bfloat16" in row["config"] or "float16" in row["config"]
            if wide and not row["matrix_instructions"]:
                failures.append(f"{key(row)}: no matrix instructions")
        if budget is not None:
            allowed = budget.get(key(row))
            if allowed is None:
                failures.append(f"{key(row)}: has no budget; run python {Path(__file__).name}")
            else:
                over = [f"{k} {row[k]} > {allowed[k]}" for k in LIMITS if row[k] > allowed[k]]
                failures += [f"{key(row)}: {', '.join(over)}"] if over else []
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("arch", TARGETS)
def test_within_budget(arch):
    committed = json.loads(BUDGET.read_text())
    same = triton.__version__ == committed["triton"]
    rows = list(profile_all([arch]))
    assert len(rows) > 20
    check(rows, committed["rows"] if same else None)  # another Triton allocates registers its own way


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", TARGETS)
def test_other_dtypes_do_not_spill(arch, dtype):
    check(list(profile_all([arch], [dtype])), None)


def test_rows_can_be_compiled_by_another_program():
    """`source` alone is enough: the kernel's module and name, its signature, constants and options."""
    import importlib

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    row = json.loads(json.dumps(next(iter(profile_all(["sm_90"], only="gelu")))))
    fields = "kernel config arch registers spills stack_bytes shared_bytes occupancy matrix_instructions"
    assert set(row) == {*fields.split(), "global_16_byte_share", "ceiling_us", "source"}
    assert row["ceiling_us"] == round(2 * 2 * 1025 * 12800 * 2 / 3.35e12 * 1e6, 3)
    source = row["source"]
    kernel = getattr(importlib.import_module(source["module"]), source["function"])
    constants = {(kernel.arg_names.index(name),): value for name, value in source["constants"].items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i in source["divisible_by_16"]}
    compiled = triton.compile(
        ASTSource(kernel, source["signature"], constants, attributes),
        target=GPUTarget("cuda", int(source["target"].removeprefix("sm_")), 32),
        options={"num_warps": source["num_warps"], "num_stages": source["num_stages"]},
    )
    assert compiled.metadata.shared == row["shared_bytes"]


if __name__ == "__main__":
    budget = {key(row): {k: row[k] for k in LIMITS} for row in profile_all()}
    BUDGET.write_text(json.dumps({"triton": triton.__version__, "rows": budget}, indent=1) + "\n")
