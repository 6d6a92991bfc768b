"""The CUDA bodies without torch: guard pages, sanitizers, any order of threads, and planted bugs that must be seen."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.proofs.cuda import host

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler (c++)")

ORDERS = ("ascending", "descending", "shuffled")
ONE_UNIT = ("-DINTERNVIT_ONE_UNIT",)
DRIVER = [host.HARNESS / "cuda_host.cpp", host.HARNESS / "driver.cpp"]


def link(driver: Path, objects: list[str], *flags: str) -> None:
    subprocess.run(["c++", *flags, *objects, "-o", str(driver)], check=True)


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([str(driver), *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def plain(build_folder) -> Path:
    """Of the objects in the library that the op tests load."""

    def build(driver: Path) -> None:
        link(driver, host.compile_objects(build_folder, [*host.units(), *DRIVER]))

    return build_folder.once("cuda/driver", build)


@pytest.mark.sampled(2)  # 15 s
def test_guard_pages_and_any_order_of_threads(plain) -> None:
    first = run(plain, ORDERS[0])
    assert first.returncode == 0, first.stdout[-500:]
    assert first.stdout.count("\n") > 400
    for order in ORDERS[1:]:
        other = run(plain, order)
        assert other.returncode == 0, other.stdout[-500:]
        assert other.stdout == first.stdout, f"{order}: other bits"


def test_a_planted_row_too_many_hits_the_guard(plain) -> None:
    assert run(plain, "ascending", "bounds").returncode < 0


@pytest.mark.slow  # guard pages find most of it in every run
def test_sanitizers(build_folder, tmp_path) -> None:
    flags = (*ONE_UNIT, "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    sources = [host.SOURCES / "cuda/instantiate/bfloat16.cu", *DRIVER]
    link(tmp_path / "driver", host.compile_objects(build_folder, sources, *flags), *flags)
    done = run(tmp_path / "driver", "shuffled")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]


BUGS = {
    "missing barrier in the row sum": (
        "device/rows.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int n = 0; n < N; ++n) x[n] = 0.0f;",
        "#pragma unroll\n  for (int n = 0; n < N; ++n) x[n] = 0.0f;",
        "shared memory",
    ),
    "one buffer for every row of a persistent block": (
        "ops/norm_backward.cuh",
        "sum_over_row(mean_of, group_sums, turn)",
        "sum_over_row(mean_of, group_sums, 0)",
        "shared memory that another thread read since the last barrier",
    ),
    "missing barrier between sums of a block": (
        "ops/norm_backward.cuh",
        "  if (last > 0) __syncthreads();",
        "",
        "shared memory",
    ),
    "missing barrier in the final sum": (
        "ops/norm_backward.cuh",
        "  __syncthreads();\n  if (threadIdx.y > 0) return;",
        "  if (threadIdx.y > 0) return;",
        "shared memory",
    ),
    "wrong shuffle mask": (
        "device/rows.cuh",
        "__shfl_xor_sync(0xffffffffu, x[n], offset)",
        "__shfl_xor_sync(0xffffu, x[n], offset)",
        "mask",
    ),
    "a lane that leaves before the others shuffle": (
        "ops/norm.cuh",
        "  if (!p.rstd) return;",
        "  if (!p.rstd || !active) return;",
        "has ended",
    ),
    "a barrier that not all threads reach": (
        "device/rows.cuh",
        "  __syncthreads();\n#pragma unroll\n  for (int n = 0; n < N; ++n) x[n] = 0.0f;",
        "  if (threadIdx.x >= 16) __syncthreads();\n#pragma unroll\n  for (int n = 0; n < N; ++n) x[n] = 0.0f;",
        "",
    ),
    "off by one in the last vector": (
        "device/rows.cuh",
        "count(channels - c < W ? channels - c : W)",
        "count(channels - c < W - 1 ? channels - c : W)",
        "",
    ),
    "off by one in the rows": (
        "ops/norm.cuh",
        "const bool active = row < p.rows;  // the others",
        "const bool active = row <= p.rows;  // the others",
        "",
    ),
    "a group too few in the sum": (
        "device/rows.cuh",
        "for (int g = 0; g < groups; ++g)",
        "for (int g = 0; g < groups - 1; ++g)",
        "off by",
    ),
    "a partial row too few": (
        "ops/norm_backward.cuh",
        "program < p.partial_rows;",
        "program < p.partial_rows - 1;",
        "off by",
    ),
    "the first pivot's mean only": (
        "ops/norm.cuh",
        "s.rest = centred[0] / float(channels);",
        "s.rest = 0.0f;",
        "off by",
    ),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug, build_folder, tmp_path) -> None:
    file, right, wrong, message = BUGS[bug]
    copy = tmp_path / "csrc"
    shutil.copytree(host.SOURCES, copy)
    path = copy / "cuda" / file
    text = path.read_text()
    assert text.count(right) == 1, f"{right!r} stands {text.count(right)} times in {file}"
    path.write_text(text.replace(right, wrong))
    unit = host.compile_objects(build_folder, [copy / "cuda/instantiate/bfloat16.cu"], *ONE_UNIT, root=copy)
    link(tmp_path / "driver", [*unit, *host.compile_objects(build_folder, DRIVER, *ONE_UNIT)])
    done = run(tmp_path / "driver", "shuffled")
    assert done.returncode != 0, "the driver saw nothing"
    assert message in done.stdout
