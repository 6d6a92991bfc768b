"""Instructions that each CPU kernel takes for fixed shapes, counted by callgrind: speed without a clock.

    python -m tests.proofs.native.instructions --update     writes instructions.json after a change that is meant

The generic and AVX2 units (valgrind knows no AVX-512), with the library's own flags, one thread. Counts depend on the
compiler: the budget names the one it was taken with.
"""

import argparse
import json
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.proofs.native import cpu_driver
from tests.support.building import BuildFolder

BUDGET = Path(__file__).with_name("instructions.json")
UNITS, DTYPES = ("generic", "avx2"), ("float32", "bfloat16")
TABLE = (cpu_driver.SOURCES / "cpu/kernels.h").read_text().partition("struct Kernels {")[2].partition("};")[0]
LINEARS = {
    "float32": ("pack_weight_int8", "linear_int8", "mlp_int8", "pack_weight_float32", "linear_float32"),
    "bfloat16": ("pack_weight_int8", "linear_int8", "mlp_int8", "pack_weight", "linear"),
}
"""By the dtype of x; the generic unit has none."""
KERNELS = [k for k in re.findall(r"void \(\*(\w+)\)", TABLE) if k not in {"peak", *sum(LINEARS.values(), ())}]
"""The kernels of every unit."""
ALLOWED = 1.03


def compiler() -> str:
    """Name and version of `c++`, which the counts belong to."""
    return subprocess.run(["c++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def count(driver: Path, unit: str, dtype: str, folder: Path) -> dict[str, int]:
    """Kernel -> instructions of its calls, everything it calls included; the profile is written into `folder`."""
    profile = folder / f"{unit}-{dtype}.callgrind"
    call = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", str(driver), unit, "counted", dtype]
    subprocess.run(call, capture_output=True, text=True, check=True, timeout=300)
    annotate = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(profile)]
    text = subprocess.run(annotate, capture_output=True, text=True, check=True).stdout
    counts = {}
    for kernel in [*KERNELS, *(LINEARS[dtype] if unit == "avx2" else ())]:
        name = rf"(?:void )?internvit::{unit}::{kernel.removesuffix('_float32')}(?:<.*>)?"
        found = re.search(rf"([\d,]+) \([^)]*\)\s+\S*:{name}\(internvit::\w+Params(?:Of<[^>]*>)? const&", text)
        if found is None:
            raise LookupError(f"callgrind saw no call of {kernel} in the unit {unit}")
        counts[kernel] = int(found[1].replace(",", ""))
    return counts


def measure(driver: Path, folder: Path) -> dict[str, dict[str, int]]:
    """ "unit dtype" -> kernel -> instructions."""
    keys = [(unit, dtype) for unit in UNITS for dtype in DTYPES]
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(lambda key: count(driver, *key, folder), keys))
    return {" ".join(key): found for key, found in zip(keys, counts, strict=True)}


def risen(budget: dict[str, dict[str, int]], counts: dict[str, dict[str, int]]) -> list[str]:
    """The kernels that take over 3 % more than their budget."""
    return [
        f"{kernel} in the unit {where}: {counts[where][kernel]:,} instructions, budget {allowed:,}"
        for where, kernels in budget.items()
        for kernel, allowed in kernels.items()
        if counts[where][kernel] > ALLOWED * allowed
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.native.instructions", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the counts as the new budget")
    update = parser.parse_args().update
    with tempfile.TemporaryDirectory() as folder:
        counts = measure(cpu_driver.build(BuildFolder(Path(folder))), Path(folder))
    old = json.loads(BUDGET.read_text())["instructions"] if BUDGET.exists() else {}
    for where, kernels in counts.items():
        for kernel, number in kernels.items():
            was = old.get(where, {}).get(kernel)
            print(f"{where:18} {kernel:24} {number:>12,}{f'  {number / was - 1:+.2%}' if was else ''}")
    if update:
        BUDGET.write_text(json.dumps({"compiler": compiler(), "instructions": counts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
