"""Builds driver.cpp with the units of csrc/cpu, by setup.py's commands: it runs the objects that the library has."""

import subprocess
from pathlib import Path

from tests.support import CPU_UNITS, ROOT
from tests.support.building import BuildFolder, setup_module

SOURCES = ROOT / "csrc"
ISA = SOURCES / "cpu" / "isa"
DRIVER = Path(__file__).with_name("driver.cpp")
EMULATED = Path(__file__).with_name("amx_emulated.cpp")
INSTRUMENTED = [ISA / "generic.cpp", ISA / "dispatch.cpp", DRIVER]
VECTOR_UNITS = [ISA / f"{unit}.cpp" for unit in CPU_UNITS if unit != "generic"]
AS = {DRIVER: ISA / "dispatch.cpp", EMULATED: ISA / "avx512_bf16.cpp"}
"""The sources whose flags these have."""


def compile_all(folder: BuildFolder, sources: list[Path], *extra: str, root: Path = SOURCES) -> list[str]:
    """Object files of `sources`, which lie in csrc or in its copy `root`."""
    commands = setup_module().cpu_plan().compiles

    def command(source: Path) -> list[str]:
        original = SOURCES / source.relative_to(root) if source.is_relative_to(root) else source
        plain = commands[AS.get(original, original)]
        return [f"-I{root}" if word == f"-I{SOURCES}" else word for word in plain] + list(extra)

    return folder.all_compiled((source, command(source)) for source in sources)


def link(driver: Path, objects: list[str], *extra: str) -> Path:
    subprocess.run(["c++", *extra, *objects, "-pthread", "-o", str(driver)], check=True)
    return driver


def build(folder: BuildFolder) -> Path:
    return folder.once("cpu/driver", lambda target: link(target, compile_all(folder, [*INSTRUMENTED, *VECTOR_UNITS])))


def build_emulated(folder: BuildFolder) -> Path:
    """The driver with the AMX unit on emulated tiles in place of the AVX512-BF16 unit; -O1 takes half the time."""
    others = [path for path in (*INSTRUMENTED, *VECTOR_UNITS) if path != AS[EMULATED]]

    def build(target: Path) -> None:
        link(target, [*compile_all(folder, [EMULATED], "-O1"), *compile_all(folder, others)])

    return folder.once("cpu/driver_emulated", build)


def build_sanitized(folder: BuildFolder, sanitizer: str) -> Path:
    """The driver with the generic unit instrumented; the others are the plain ones, to be linked only."""
    flag = f"-fsanitize={sanitizer}"

    def build(target: Path) -> None:
        link(target, [*compile_all(folder, INSTRUMENTED, "-O1", flag), *compile_all(folder, VECTOR_UNITS)], flag)

    return folder.once(f"cpu/driver_{sanitizer}", build)
