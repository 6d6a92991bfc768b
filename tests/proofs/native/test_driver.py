"""The CPU kernels without torch: races, reads and writes out of bounds, and dependence on the order of work.

torch's pool gives ThreadSanitizer false races, and AddressSanitizer sees no tile or masked loads: so the bodies run in
a driver of their own, on std::threads for the generic unit, between guard pages for all.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.proofs.native import cpu_driver
from tests.support import CPU_UNITS

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler (c++)"),
    pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="built on x86-64 Linux"),
]


@pytest.fixture(scope="module")
def driver(build_folder) -> Path:
    return cpu_driver.build(build_folder)


@pytest.fixture(scope="module")
def emulated(driver: Path, build_folder) -> Path:
    run(driver, "avx512_bf16", "serial")  # skips, before anything is compiled, where this machine lacks the unit
    return cpu_driver.build_emulated(build_folder)


@pytest.fixture(scope="module")
def thread_sanitized(build_folder) -> Path:
    return cpu_driver.build_sanitized(build_folder, "thread")


@pytest.fixture(scope="module")
def address_sanitized(build_folder) -> Path:
    return cpu_driver.build_sanitized(build_folder, "address")


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(driver), *arguments], capture_output=True, text=True, timeout=300, env=environment)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    return done


@pytest.mark.parametrize("unit", CPU_UNITS)
def test_guard_pages_and_any_order_of_work(driver: Path, unit: str) -> None:
    serial = run(driver, unit, "serial")
    assert serial.returncode == 0, serial.stderr
    assert serial.stdout.count("\n") > 40
    for mode in ("shuffled", "threads"):
        other = run(driver, unit, mode)
        assert other.returncode == 0, other.stderr
        assert other.stdout == serial.stdout


def test_the_amx_unit_on_emulated_tiles(emulated: Path) -> None:
    """Tiles that no scope configured, or a scope left open, trap."""
    test_guard_pages_and_any_order_of_work(emulated, "amx_emulated")


@pytest.mark.parametrize("unit", CPU_UNITS)
def test_a_planted_row_too_many_hits_the_guard(driver: Path, unit: str) -> None:
    assert run(driver, unit, "serial", "bounds").returncode < 0


@pytest.mark.sampled(6)  # 10 s of compiling
def test_thread_sanitizer_on_the_generic_unit(thread_sanitized: Path) -> None:
    done = run(thread_sanitized, "generic", "threads")
    assert done.returncode == 0, done.stderr


@pytest.mark.sampled(6)  # 10 s of compiling
def test_thread_sanitizer_sees_a_planted_race(thread_sanitized: Path) -> None:
    done = run(thread_sanitized, "generic", "threads", "race")
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.slow  # guard pages find most of it in every run
def test_address_sanitizer_on_the_generic_unit(address_sanitized: Path) -> None:
    done = run(address_sanitized, "generic", "threads")
    assert done.returncode == 0, done.stderr


def test_units_leave_no_symbol_for_the_linker_to_mix_up(build_folder) -> None:
    """A weak symbol outside a unit's namespace is kept once, with one unit's instructions, for all."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    for unit in CPU_UNITS:
        (compiled,) = cpu_driver.compile_all(build_folder, [cpu_driver.ISA / f"{unit}.cpp"])
        listing = subprocess.run(["nm", "-C", compiled], capture_output=True, text=True)
        assert listing.returncode == 0
        symbols = [line.split(maxsplit=2) for line in listing.stdout.splitlines() if line[:1] in "0123456789abcdef"]
        weak = [s[2] for s in symbols if s[1] in "WVu" and f"internvit::{unit}::" not in s[2]]
        assert weak == [], f"{unit}.o"
