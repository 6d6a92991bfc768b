"""The CPU kernels without torch: races, reads and writes out of bounds, and dependence on the order of work.

torch's pool gives ThreadSanitizer false races, and AddressSanitizer sees no tile or masked loads: so the bodies run in
a driver of their own, on std::threads for the generic unit, between guard pages for all.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.building import ROOT, setup_module

SOURCES = ROOT / "csrc"
EMULATED = ROOT / "tests" / "proofs" / "native" / "amx_emulated.cpp"
UNITS = ("generic", "avx2", "avx512", "avx512_bf16", "amx")

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler (c++)"),
    pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="built on x86-64 Linux"),
]


def compile_all(folder: Path, sources: list[Path], *extra: str, root: Path = SOURCES) -> list[str]:
    unit_flags = setup_module().UNIT_FLAGS
    flags = {**unit_flags, EMULATED.name: unit_flags["avx512_bf16.cpp"]}

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        command = ["c++", "-std=c++17", "-Wno-psabi", *extra, *flags.get(source.name, []), f"-I{root}"]
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return str(target)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def link(folder: Path, objects: list[str], *extra: str) -> Path:
    subprocess.run(["c++", *extra, *objects, "-pthread", "-o", str(folder / "driver")], check=True)
    return folder / "driver"


ISA = SOURCES / "cpu" / "isa"
INSTRUMENTED = [ISA / "generic.cpp", ISA / "dispatch.cpp", Path(__file__).parent / "driver.cpp"]
VECTOR_UNITS = [ISA / f"{unit}.cpp" for unit in UNITS[1:]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return link(folder, compile_all(folder, [*INSTRUMENTED, *VECTOR_UNITS], "-O2"))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, driver: Path) -> Path:
    """The driver with the AMX unit on emulated tiles in place of the AVX512-BF16 unit."""
    folder = tmp_path_factory.mktemp("emulated")
    others = [str(path) for path in driver.parent.glob("*.o") if path.stem != "avx512_bf16"]
    return link(folder, [*compile_all(folder, [EMULATED], "-O2"), *others])


def sanitized(folder: Path, driver: Path, *extra: str) -> Path:
    """The driver with the generic unit instrumented; the others come from the plain build, to be linked only."""
    units = [str(driver.parent / f"{source.stem}.o") for source in VECTOR_UNITS]
    return link(folder, [*compile_all(folder, INSTRUMENTED, "-O1", *extra), *units], *extra)


@pytest.fixture(scope="module")
def thread_sanitized(tmp_path_factory, driver: Path) -> Path:
    return sanitized(tmp_path_factory.mktemp("thread"), driver, "-fsanitize=thread")


@pytest.fixture(scope="module")
def address_sanitized(tmp_path_factory, driver: Path) -> Path:
    return sanitized(tmp_path_factory.mktemp("address"), driver, "-fsanitize=address")


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(driver), *arguments], capture_output=True, text=True, timeout=300, env=environment)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    return done


@pytest.mark.parametrize("unit", UNITS)
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


@pytest.mark.parametrize("unit", UNITS)
def test_a_planted_row_too_many_hits_the_guard(driver: Path, unit: str) -> None:
    assert run(driver, unit, "serial", "bounds").returncode < 0


def test_thread_sanitizer_on_the_generic_unit(thread_sanitized: Path) -> None:
    done = run(thread_sanitized, "generic", "threads")
    assert done.returncode == 0, done.stderr


def test_thread_sanitizer_sees_a_planted_race(thread_sanitized: Path) -> None:
    done = run(thread_sanitized, "generic", "threads", "race")
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.slow  # guard pages find most of it in every run
def test_address_sanitizer_on_the_generic_unit(address_sanitized: Path) -> None:
    done = run(address_sanitized, "generic", "threads")
    assert done.returncode == 0, done.stderr


def test_units_leave_no_symbol_for_the_linker_to_mix_up(driver: Path) -> None:
    """A weak symbol outside a unit's namespace is kept once, with one unit's instructions, for all."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm (binutils)")
    for unit in UNITS:
        listing = subprocess.run(["nm", "-C", str(driver.parent / f"{unit}.o")], capture_output=True, text=True)
        assert listing.returncode == 0
        symbols = [line.split(maxsplit=2) for line in listing.stdout.splitlines() if line[:1] in "0123456789abcdef"]
        weak = [s[2] for s in symbols if s[1] in "WVu" and f"internvit::{unit}::" not in s[2]]
        assert weak == [], f"{unit}.o"
