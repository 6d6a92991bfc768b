"""nvcc compiled every kernel for every architecture, without spills, within the budget, with 16-byte accesses."""

import json
import re
import shutil

import pytest

from tests.proofs.cuda.static_profile import (
    ARCHITECTURES,
    BUDGET,
    LIBRARY,
    LIMITS,
    SOURCES,
    architectures,
    key,
    profile,
    toolkit,
    unique,
)

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None and not LIBRARY.exists(), reason="needs nvcc: internvit_cuda is not built without it"
)


@pytest.fixture(scope="module", params=["one", *(pytest.param(a, marks=pytest.mark.slow) for a in ARCHITECTURES)])
def rows(request):
    """Of one architecture, by the run's seed: disassembling it takes 11 s of a core."""
    assert LIBRARY.exists(), "nvcc is here but internvit_cuda is not: its build failed; `make setup` says why"
    there = architectures(LIBRARY)
    assert there, "cuobjdump lists no machine code"
    if request.param in ARCHITECTURES and request.param not in there:
        pytest.skip(f"internvit_cuda is built for {', '.join(there)}")
    known = [arch for arch in ARCHITECTURES if arch in there]
    if not known:
        pytest.skip(f"internvit_cuda is built for {', '.join(there)}, whose figures nobody committed")
    one = known[request.config.option.seed % len(known)]
    return unique(profile(one if request.param == "one" else request.param))


def test_the_library_is_that_of_the_sources() -> None:
    newest = max((p for p in SOURCES.glob("c[ou]*/**/*") if p.is_file()), key=lambda p: p.stat().st_mtime)
    assert LIBRARY.stat().st_mtime > newest.stat().st_mtime, f"{newest.name} is newer than the library: make setup"


@pytest.mark.sampled(4)  # with the others of `rows`
def test_every_instantiation_is_there(rows) -> None:
    """Three vector counts for five pairs of dtypes: forward aligned and scalar; backward twice aligned, once scalar.

    Quantised rows: the norms' as forward, others without a residual's dtype. Other kernels: three dtypes, aligned and
    scalar.
    """
    listed = re.findall(r"INTERNVIT_VECTORS_\d+_BIT\(X\) (.*)", (SOURCES / "cuda/device/launch.h").read_text())
    ladders = [len(re.findall(r"X\(\d+\)", line)) for line in listed]  # 16 bit, 32 bit
    row_kernels = 2 * ladders[0] + 3 * ladders[1]
    texts = [path.read_text() for path in (SOURCES / "cuda/ops").glob("*.cuh")]
    kernels = [name for text in texts for name in re.findall(r"(\w+_kernel)\(const __grid_constant__", text)]
    count = dict.fromkeys(kernels, 2 * 3) | {
        "norm_kernel": 2 * row_kernels,
        "norm_quantized_kernel": 2 * row_kernels,
        "norm_backward_kernel": 3 * row_kernels,
        "quantize_rows_kernel": 2 * (2 * ladders[0] + ladders[1]),
    }
    assert {k: sum(r["kernel"] == k for r in rows) for k in count} == count
    assert len(rows) == sum(count.values())


@pytest.mark.sampled(2)  # with the others of `rows`
def test_within_budget(rows) -> None:
    committed = json.loads(BUDGET.read_text())
    same = committed["nvcc"] == toolkit()  # another nvcc allocates registers its own way
    failures = []
    for row in rows:
        if row["spills"] or row["stack_bytes"]:
            failures.append(f"{key(row)}: {row['spills']} bytes spilled, {row['stack_bytes']} bytes of stack")
        allowed = committed["rows"].get(key(row))
        if allowed is None:
            failures.append(f"{key(row)}: has no budget; run python -m tests.proofs.cuda.static_profile --update")
        elif same:
            over = [f"{k} {row[k]} > {allowed[k]}" for k in LIMITS if row[k] > allowed[k]]
            if row["global_16_byte"] < allowed["global_16_byte"]:
                over.append(f"16-byte accesses {row['global_16_byte']} < {allowed['global_16_byte']}")
            failures += [f"{key(row)}: {', '.join(over)}"] if over else []
    assert not failures, "\n".join(failures)


@pytest.mark.sampled(2)  # with the others of `rows`
def test_hot_loops_move_16_bytes(rows) -> None:
    """Where an aligned kernel still loads, only statistics and row scales are narrower; a scalar one moves elements.

    A 16-bit branch beside a float32 residual moves in vectors of 8 bytes, as quantised rows do. After its last load a
    block of backward writes its one row of sums; ptxas splits some of these stores.
    """
    streams = {"norm_kernel": 5, "norm_quantized_kernel": 4, "norm_backward_kernel": 6, "quantize_rows_kernel": 1}
    of_residual = {"norm_kernel": 3, "norm_quantized_kernel": 3, "norm_backward_kernel": 3}
    for row in rows:
        if "scalar" in row["config"]:
            assert row["global_16_byte"] == 0, key(row)
            continue
        vectors = int(re.search(r"vectors=(\d+)", row["config"] + " vectors=1").group(1))
        mixed = row["config"].split()[1] == "float32"
        assert row["global_16_byte"] >= (of_residual if mixed else streams).get(row["kernel"], 3) * vectors, key(row)
        if row["kernel"] != "gelu_kernel":  # its last vector may not be whole and has a path of its own
            narrow = row["narrow_until_last_load"]
            assert narrow <= 3, f"{key(row)}: {narrow} narrow global accesses"
