"""Builds the package; the compiled libraries are optional, their absence is one logged line with the reason.

`internvit/lib/internvit_cpu.so` and `internvit_cuda.so` are C++17 on torch's stable ABI: one binary for every Python
and torch >= 2.10, loaded by `torch.ops.load_library`, so the wheel carries no Python version. torch is not a build
requirement: under build isolation it is not seen and the package installs without the libraries
(`pip install --no-build-isolation .`). No device is asked: `internvit_cuda` is built where nvcc is, beside a torch
built for CUDA; INTERNVIT_CUDA=0 leaves it out, INTERNVIT_CUDA=1 warns where it cannot be built. The CPU kernels are
compiled for every instruction set, with INTERNVIT_CPU_UNITS=native for this machine alone. TORCH_CUDA_ARCH_LIST and
MAX_JOBS mean what they mean for torch's own extensions.
"""

import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:
    from wheel.bdist_wheel import bdist_wheel

logger = logging.getLogger("internvit.build")

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
INCLUDES = [f"-I{CSRC}", "-I."]  # the build folder holds schemas.h
COMMON_FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi"]
COMMON_FLAGS += [f"-fmacro-prefix-map={CSRC}=csrc"]  # errors name their source as csrc/..., wherever it was built
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_VNNI_FLAGS = [*AVX512_FLAGS, "-mavx512vnni"]
AVX512_BF16_FLAGS = [*AVX512_VNNI_FLAGS, "-mavx512bf16"]
UNIT = "-fno-exceptions"  # a landing pad refers to the personality routine by a weak symbol
UNIT_FLAGS = {
    "generic.cpp": [UNIT],
    "avx2.cpp": [UNIT, *AVX2_FLAGS],
    "avx512.cpp": [UNIT, *AVX512_FLAGS, "-mprefer-vector-width=512"],
    "avx512_vnni.cpp": [UNIT, *AVX512_VNNI_FLAGS, "-mprefer-vector-width=512"],
    "avx512_bf16.cpp": [UNIT, *AVX512_BF16_FLAGS, "-mprefer-vector-width=512"],
    "amx.cpp": [
        UNIT,
        *AVX512_BF16_FLAGS,
        "-mamx-tile",
        "-mamx-bf16",
        "-mamx-int8",
        "-mprefer-vector-width=512",
    ],
}
"""Each unit's own instruction set, worst first; the machine that runs the library chooses (cpu/isa/dispatch.cpp)."""


CUDA_ARCHITECTURES = "8.0 9.0 10.0+PTX"
NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror", "all-warnings"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror"]
NVCC_FLAGS += ["-fmad=false"]
"""The bodies write every fused multiply-add out: all instantiations, and the host in tests, round alike."""


@dataclass(frozen=True)
class Plan:
    """How a library is built: a command per source without `-c SOURCE -o OBJECT`, and the link around the objects."""

    name: str
    compiles: dict[Path, list[str]]
    link: list[str]
    link_end: list[str]


class BuildLibraries(build_ext):
    """Builds the libraries that can be built here, and says in one line why another cannot."""

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        try:
            # Not in self.build_temp, which is new for every editable install: objects are kept for the next build.
            built = build_library(PLANS[name](), ROOT / "build" / name)
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            asked = name != "internvit_cuda" or os.environ.get("INTERNVIT_CUDA") == "1"
            level = logging.WARNING if asked or not isinstance(error, MissingError) else logging.INFO
            logger.log(level, "%s is not built, its ops run on other backends: %s", name, reason[0])
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


class MissingError(RuntimeError):
    """What a library needs is not on this machine."""


def torch_cpp_extension():  # type: ignore[no-untyped-def]
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise MissingError(f"no torch here ({error}); pip install --no-build-isolation sees yours") from error
    return cpp_extension


def cpu_plan() -> Plan:
    """csrc/cpu with the torch of this environment."""
    cpp_extension = torch_cpp_extension()
    cxx = cpp_extension.get_cxx_compiler()
    units = {f"{name}.cpp": UNIT_FLAGS[f"{name}.cpp"] for name in chosen_units(cxx)}
    if len(units) > 1 and os.environ.get("INTERNVIT_CPU_UNITS", "").strip() == "native":
        units["generic.cpp"] = [*UNIT_FLAGS["generic.cpp"], "-O1"]  # this machine takes another
    compiler = [cxx, *COMMON_FLAGS, "-fPIC", *INCLUDES]
    torch_flags = [STABLE_ABI, *(f"-isystem{path}" for path in cpp_extension.include_paths())]
    compiles = {
        CSRC / "cpu" / "isa" / name: [*compiler, *flags] for name, flags in {**units, "dispatch.cpp": []}.items()
    }
    for source in sorted((CSRC / "cpu" / "torch").glob("*.cpp")):
        compiles[source] = [*compiler, *torch_flags]
    link = [*compiler, "-shared", *(f"-L{path}" for path in cpp_extension.library_paths())]
    link_end = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-ltorch_cpu", "-lc10"]
    return Plan("internvit_cpu", compiles, link, link_end)


def chosen_units(cxx: str) -> list[str]:
    """The units of INTERNVIT_CPU_UNITS, by default all of this architecture's; the generic one is always among them.

    The variable names units, or says "native": the best that this machine runs, and the one before AMX, which the
    system may refuse, or before AVX-512 without VNNI, which leaves int8 to it.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    known = [Path(name).stem for name in UNIT_FLAGS if x86 or name == "generic.cpp"]
    asked = re.findall(r"[^ ;,]+", os.environ.get("INTERNVIT_CPU_UNITS", ""))
    if asked == ["native"] and x86:
        here = isa_macros(cxx, "-march=native")
        native = [name for name in known if isa_macros(cxx, *UNIT_FLAGS[f"{name}.cpp"]) <= here]
        asked = native[-2:] if native[-1] in ("amx", "avx512") else native[-1:]
    elif not asked or asked == ["native"]:
        asked = known
    if unknown := sorted(set(asked) - set(known)):
        raise RuntimeError(f"INTERNVIT_CPU_UNITS: expected 'native' or some of {', '.join(known)}, got {unknown[0]!r}")
    return [name for name in known if name == "generic" or name in asked]


def isa_macros(cxx: str, *flags: str) -> set[str]:
    """The macros of a compiler with `flags` that it has not without: one for each extension of the instruction set."""

    def defined(*flags: str) -> set[str]:
        call = [cxx, *flags, "-dM", "-E", "-x", "c++", os.devnull]
        return set(re.findall(r"#define (__\w+__) 1$", subprocess.check_output(call, text=True), re.MULTILINE))

    return defined(*flags) - defined()


def cuda_plan() -> Plan:
    """csrc/cuda with nvcc and the torch of this environment."""
    if os.environ.get("INTERNVIT_CUDA") == "0":
        raise MissingError("INTERNVIT_CUDA=0")
    nvcc = find_nvcc()
    cpp_extension = torch_cpp_extension()
    import torch

    version = re.search(r"release (\d+)\.", output_of([nvcc, "--version"]))
    if torch.version.cuda is None:
        raise MissingError(f"torch {torch.__version__} here is built without CUDA")
    if version and version[1] != torch.version.cuda.partition(".")[0]:
        raise MissingError(f"nvcc here is of CUDA {version[1]}, torch of CUDA {torch.version.cuda}")
    includes, libraries = toolkit_folders(nvcc)
    device_compiler = [nvcc, *NVCC_FLAGS, *INCLUDES, *architecture_flags(nvcc)]
    host_compiler = [
        cpp_extension.get_cxx_compiler(),
        *COMMON_FLAGS,
        *INCLUDES,
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        STABLE_ABI,
    ]
    host_compiler += [f"-isystem{path}" for path in [*cpp_extension.include_paths(), *includes]]
    compiles = dict.fromkeys(sorted((CSRC / "cuda" / "instantiate").glob("*.cu")), device_compiler)
    compiles[CSRC / "cuda" / "torch" / "bindings.cpp"] = host_compiler
    link = [*host_compiler, "-shared", *(f"-L{path}" for path in [*cpp_extension.library_paths(), *libraries])]
    return Plan("internvit_cuda", compiles, link, ["-ltorch_cuda", "-ltorch_cpu", "-lc10", "-lcudart"])


PLANS = {"internvit_cpu": cpu_plan, "internvit_cuda": cuda_plan}


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, of the path, or where the toolkit's own installer puts it."""
    for place in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), None, "/usr/local/cuda"):
        found = shutil.which("nvcc", path=f"{place}/bin" if place else None)
        if found:
            return found
    raise MissingError("no nvcc here; install the CUDA toolkit, or set CUDA_HOME to it")


def toolkit_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """nvcc's own folders of headers and of libraries: torch takes them from nvcc's path, which may be a wrapper's."""
    told = output_of([nvcc, "--dryrun", "-c", "nothing.cu"])
    by_name = dict(re.findall(r"^#\$ (INCLUDES|SYSTEM_INCLUDES|LIBRARIES)=(.*)$", told, re.MULTILINE))
    includes = re.findall(r'"-I([^"]+)"', by_name.get("INCLUDES", ""))
    libraries = [path for path in re.findall(r'"-L([^"]+)"', by_name.get("LIBRARIES", "")) if "stubs" not in path]
    if not includes or not any((Path(path) / "libcudart.so").exists() for path in libraries):
        raise MissingError(f"{nvcc} has no libcudart.so in {', '.join(libraries) or 'its folders'}")
    return includes, libraries


def architecture_flags(nvcc: str) -> list[str]:
    """-gencode for TORCH_CUDA_ARCH_LIST, or for those of CUDA_ARCHITECTURES that this nvcc knows."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    known = set(re.findall(r"compute_(\w+)", output_of([nvcc, "--list-gpu-arch"])))
    flags = []
    for name in re.split(r"[ ;,]+", asked or CUDA_ARCHITECTURES):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST: expected numbers as '8.0;9.0+PTX', got {name!r}")
        number = match[1] + match[2]
        if not asked and number not in known:
            continue
        code = f"sm_{number}{match[3]}"
        flags.append(f"-gencode=arch=compute_{number}{match[3]},code={code}")
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number}{match[3]},code=compute_{number}{match[3]}")
    if not flags:
        raise MissingError(f"this nvcc knows none of {CUDA_ARCHITECTURES}; set TORCH_CUDA_ARCH_LIST")
    return flags


def output_of(command: list[str]) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout


def jobs() -> str:
    """MAX_JOBS, or as many compilers as there are cores and 2 GiB of memory for."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**32
    return os.environ.get("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, memory // 2**31))))


def build_library(plan: Plan, build: Path) -> Path:
    """Compiles and links; returns the library's path."""
    build.mkdir(parents=True, exist_ok=True)
    write_schemas(plan.name, build / "schemas.h")
    (run_ninja if shutil.which("ninja") else run_serially)(build, plan)
    return build / f"{plan.name}.so"


def write_schemas(library: str, header: Path) -> None:
    """The raw ops' schemas, as Python states them, for a library that loads without Python."""
    # internvit itself imports safetensors, which an environment that builds it may not have yet; its ops need torch.
    code = """
import sys, types
package = sys.modules["internvit"] = types.ModuleType("internvit")
package.__path__ = ["internvit"]
import internvit.ops
from internvit.ops.backends import schemas
print(*schemas.schemas(sys.argv[1]).values(), sep="\\n")
"""
    asked = [sys.executable, "-c", code, library]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the schemas of {library} cannot be read: {done.stderr.strip().splitlines()[-1]}")
    lines = "".join(f'    "{schema}",\n' for schema in done.stdout.splitlines())
    text = f"""// The schemas of {library}'s raw ops: written by setup.py from internvit/ops, not to be edited.
#pragma once

namespace internvit {{

constexpr const char* kSchemas[] = {{
{lines}}};

}}  // namespace internvit
"""
    if not header.exists() or header.read_text() != text:  # an untouched header compiles nothing anew
        header.write_text(text)


def run_ninja(build: Path, plan: Plan) -> None:
    """Several compilers at a time, and only what changed."""
    rules = (("run", ["  depfile = $depfile", "  deps = gcc"]), ("link", []))
    lines = [line for name, more in rules for line in (f"rule {name}", "  command = $command", *more)]
    for source, command in plan.compiles.items():
        stem = source.stem
        call = [*command, "-MMD", "-MF", f"{stem}.d", "-c", str(source), "-o", f"{stem}.o"]
        lines += [f"build {stem}.o: run {source}", f"  command = {shlex.join(call)}", f"  depfile = {stem}.d"]
    objects, library = [f"{source.stem}.o" for source in plan.compiles], f"{plan.name}.so"
    lines += [f"build {library}: link {' '.join(objects)}"]
    lines += [f"  command = {shlex.join([*plan.link, *objects, '-o', library, *plan.link_end])}", ""]
    (build / "build.ninja").write_text("\n".join(lines))
    run(["ninja", "-j", jobs()], build)


def run_serially(build: Path, plan: Plan) -> None:
    objects = []
    for source, command in plan.compiles.items():
        objects.append(f"{source.stem}.o")
        run([*command, "-c", str(source), "-o", objects[-1]], build)
    run([*plan.link, *objects, "-o", f"{plan.name}.so", *plan.link_end], build)


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
    ext_modules=[Extension(f"internvit.lib.{name}", sources=[], optional=True) for name in PLANS],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PythonFreeWheel},
    distclass=CompiledDistribution,
)
