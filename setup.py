"""Builds the package; the compiled libraries are optional, their absence is one logged line with the reason.

`internvit/lib/internvit_cpu.so` is plain C++17 on torch's stable ABI: one binary for every Python and torch >= 2.10,
loaded by `torch.ops.load_library`, so the wheel carries no Python version. torch is not a build requirement: under
build isolation it is not seen and the package installs without the library (`pip install --no-build-isolation .`).
"""

import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

logger = logging.getLogger("internvit.build")

SOURCES = Path(__file__).resolve().parent / "csrc" / "cpu"
LIBRARY = "internvit_cpu.so"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
COMMON_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
UNIT = "-fno-exceptions"  # a landing pad refers to the personality routine by a weak symbol
UNIT_FLAGS = {
    "isa_generic.cpp": [UNIT],
    "isa_avx2.cpp": [UNIT, *AVX2_FLAGS],
    "isa_avx512.cpp": [UNIT, *AVX512_FLAGS, "-mprefer-vector-width=512"],
    "isa_avx512_bf16.cpp": [UNIT, *AVX512_FLAGS, "-mavx512bf16", "-mprefer-vector-width=512"],
    "isa_amx.cpp": [UNIT, *AVX512_FLAGS, "-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mprefer-vector-width=512"],
}
"""Each unit's own instruction set: never -march=native, the machine that runs it chooses (csrc/cpu/dispatch.cpp)."""


class BuildLibraries(build_ext):
    """Builds the libraries that can be built here, and says in one line why another cannot."""

    def build_extension(self, ext: Extension) -> None:
        try:
            built = compile_cpu_library(Path(self.build_temp).resolve() / "internvit_cpu")
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            logger.warning("internvit_cpu is not built, its ops run on PyTorch: %s", reason[0])
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"  # a shared library, not a module of one Python version

    def copy_extensions_to_source(self) -> None:
        Path("internvit/lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


def compile_cpu_library(build: Path) -> Path:
    """Compiles csrc/cpu with the torch of this environment; returns the library's path."""
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise RuntimeError(f"no torch here ({error}); pip install --no-build-isolation sees yours") from error
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    units = {name: flags for name, flags in UNIT_FLAGS.items() if x86 or name == "isa_generic.cpp"}
    build.mkdir(parents=True, exist_ok=True)
    compiler = [cpp_extension.get_cxx_compiler(), *COMMON_FLAGS, "-fPIC"]
    torch_flags = [STABLE_ABI, *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    compiles = {
        name: [*compiler, *units.get(name, []), *(torch_flags if name == "bindings.cpp" else [])]
        for name in [*units, "dispatch.cpp", "bindings.cpp"]
    }
    link = [*compiler, "-shared", *(f"-L{path}" for path in cpp_extension.library_paths())]
    link_end = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ltorch_cpu", "-lc10"]
    (run_ninja if shutil.which("ninja") else run_serially)(build, compiles, link, link_end)
    return build / LIBRARY


def run_ninja(build: Path, compiles: dict[str, list[str]], link: list[str], link_end: list[str]) -> None:
    """Two compilers at a time, and only what changed."""
    rules = (("run", ["  depfile = $depfile", "  deps = gcc"]), ("link", []))
    lines = [line for name, more in rules for line in (f"rule {name}", "  command = $command", *more)]
    for name, command in compiles.items():
        source, stem = SOURCES / name, Path(name).stem
        call = [*command, "-MMD", "-MF", f"{stem}.d", "-c", str(source), "-o", f"{stem}.o"]
        lines += [f"build {stem}.o: run {source}", f"  command = {shlex.join(call)}", f"  depfile = {stem}.d"]
    objects = [f"{Path(name).stem}.o" for name in compiles]
    lines += [f"build {LIBRARY}: link {' '.join(objects)}"]
    lines += [f"  command = {shlex.join([*link, *objects, '-o', LIBRARY, *link_end])}", ""]
    (build / "build.ninja").write_text("\n".join(lines))
    run(["ninja", "-j", os.environ.get("MAX_JOBS", "2")], build)


def run_serially(build: Path, compiles: dict[str, list[str]], link: list[str], link_end: list[str]) -> None:
    objects = []
    for name, command in compiles.items():
        objects.append(f"{Path(name).stem}.o")
        run([*command, "-c", str(SOURCES / name), "-o", objects[-1]], build)
    run([*link, *objects, "-o", LIBRARY, *link_end], build)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        logger.warning("%s", done.stdout)
        errors = [line for line in done.stdout.splitlines() if "error" in line or "not found" in line]
        raise RuntimeError(errors[0] if errors else f"{command[0]} failed with status {done.returncode}")


class CompiledDistribution(Distribution):
    """Tells setuptools that the wheel belongs to one platform."""

    def has_ext_modules(self) -> bool:
        return True


class PythonFreeWheel(bdist_wheel):
    """py3-none-<platform>: the library knows no Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("internvit.lib.internvit_cpu", sources=[], optional=True)],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PythonFreeWheel},
    distclass=CompiledDistribution,
)
