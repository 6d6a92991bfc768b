"""What nvcc made of every kernel of `internvit_cuda`: rows in the form of `internvit.kernels.tools.static_profile`.

    python -m tests.proofs.cuda.static_profile [--update] [--json FILE]

`cuobjdump` (of the toolkit, or of Triton's wheel) reads the built library: no GPU is needed. --update writes
`budget.json` anew: read the difference before you commit it.
"""

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvit.ops.backends.native import FOLDER
from tests.support import ROOT

Row = dict[str, Any]

LIBRARY = FOLDER / "internvit_cuda.so"
SOURCES = ROOT / "csrc"
BUDGET = Path(__file__).with_name("budget.json")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LIMITS = ("registers", "stack_bytes", "shared_bytes")

_GLOBAL = re.compile(r"\b(LDG|STG)\.([\w.]+)")
_SPILL = re.compile(r"\bSTL(?:\.(64|128))?\b")
_TYPES = {"float": "float32", "internvit::bf16": "bfloat16", "internvit::f16": "float16"}
_THREADS = {"gelu_kernel": 256, "sum_partials_kernel": 256}


def cuobjdump(*arguments: str) -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        import triton

        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def architectures(library: Path) -> list[str]:
    """Those that a library has machine code for, as sm_90."""
    return sorted(set(re.findall(r"\.(sm_\d+\w?)\.cubin", cuobjdump("--list-elf", str(library)))))


def toolkit() -> str:
    """The nvcc release that the budget belongs to: another one allocates registers its own way."""
    nvcc = shutil.which("nvcc")
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout if nvcc else ""
    found = re.search(r"release ([\d.]+), V([\d.]+)", told)
    return found[2] if found else "none"


def demangled(names: list[str]) -> list[str]:
    filtered = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
    return filtered.stdout.splitlines()


def kernel_and_config(name: str) -> tuple[str, str]:
    """`norm_kernel`, `bfloat16 float32 vectors=5 aligned` of an instantiation's demangled name."""
    kernel, arguments = re.search(r"::(\w+_kernel)<([^>]*)>", name).groups()  # type: ignore[union-attr]
    words = []
    for argument in arguments.split(", "):
        if argument in _TYPES:
            words.append(_TYPES[argument])
        elif argument in ("true", "false"):
            words.append(argument)
        else:
            words.append(f"vectors={re.sub('[^0-9]', '', argument)}")
    flags = [w for w in words if w in ("true", "false")]
    config = [w for w in words if w not in ("true", "false")]
    config.append("aligned" if flags[0] == "true" else "scalar")
    config += ["layer_norm" if flags[1] == "true" else "rms_norm"] if len(flags) > 1 else []
    return kernel, " ".join(config)


def threads_of(kernel: str, config: str) -> int:
    """Of a block at the widths of InternViT (csrc/cuda/device/launch.h)."""
    return _THREADS.get(kernel, 160 if "vectors=5" in config else 128)


def occupancy(registers: int, shared_bytes: int, threads: int, arch: str) -> float:
    """Resident warps over the most a multiprocessor holds: a warp's registers lie in one of its four parts."""
    warps = -(-threads // 32)
    per_part = 16384 // (256 * -(-registers * 32 // 256))
    shared = {"sm_80": 164 << 10}.get(arch, 228 << 10)
    blocks = min(4 * per_part // warps, shared // (shared_bytes + 1024), 64 // warps, 32)
    return blocks * warps / 64


def profile(arch: str, library: Path = LIBRARY) -> Iterator[Row]:
    """A row per kernel of `library` for `arch`."""
    usage = cuobjdump("--dump-resource-usage", "-arch", arch, str(library))
    resources = dict(re.findall(r"Function (\S+):\s+(REG:\d+ STACK:\d+ SHARED:\d+)", usage))
    sass = re.split(r"Function : (\S+)", cuobjdump("-sass", "-arch", arch, str(library)))[1:]
    for mangled, name, code in zip(sass[::2], demangled(sass[::2]), sass[1::2], strict=True):
        kernel, config = kernel_and_config(name)
        registers, stack, shared = map(int, re.findall(r":(\d+)", resources[mangled]))
        accesses = [(name, width.split(".")) for name, width in _GLOBAL.findall(code)]
        moves = collections.Counter("128" in width for _, width in accesses)
        whole = {"128", "64"} if config.split()[1:2] == ["float32"] else {"128"}  # 16-bit vectors beside float32 ones
        last_load = max((i for i, (name, _) in enumerate(accesses) if name == "LDG"), default=-1)
        yield {
            "kernel": kernel,
            "config": config,
            "arch": arch,
            "registers": registers,
            "spills": sum(int(width or 32) // 8 for width in _SPILL.findall(code)),
            "stack_bytes": stack,
            "shared_bytes": shared,
            "occupancy": round(occupancy(registers, shared, threads_of(kernel, config), arch), 3),
            "matrix_instructions": {},
            "global_16_byte": moves[True],
            "global_16_byte_share": round(moves[True] / moves.total(), 3) if moves else None,
            "narrow_until_last_load": sum(whole.isdisjoint(width) for _, width in accesses[: last_load + 1]),
            "source": {"symbol": mangled, "target": arch, "library": library.name},
        }


def key(row: Row) -> str:
    return f"{row['arch']} {row['kernel']}: {row['config']}"


def unique(rows: Iterator[Row]) -> list[Row]:
    """sum_partials_kernel stands in two units of a dtype; one row is enough."""
    return list({key(row): row for row in rows}.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.cuda.static_profile", description=__doc__)
    parser.add_argument("--update", action="store_true", help="writes the budget anew")
    parser.add_argument("--json", type=Path, help="writes the rows here")
    args = parser.parse_args()
    rows = [row for arch in ARCHITECTURES for row in unique(profile(arch))]
    for row in rows:
        share = "-" if row["global_16_byte_share"] is None else f"{row['global_16_byte_share']:.2f}"
        print(
            f"{row['arch']:7} {row['kernel']:30} {row['registers']:4} {row['spills']:6} {row['shared_bytes']:7}"
            f" {row['occupancy']:5.2f} {share:>5} {row['config']}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.update:
        budget = {key(row): {k: row[k] for k in (*LIMITS, "global_16_byte")} for row in rows}
        BUDGET.write_text(json.dumps({"nvcc": toolkit(), "rows": budget}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
