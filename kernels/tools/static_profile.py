"""Compiles every kernel that the models launch, without a GPU, and reports what the compiler made of it.

    python -m internvit.kernels.tools.static_profile [--arch sm_90 ...] [--dtype bfloat16 ...] [--quick] [--part I/N]
        [--json FILE]

The launches are those of whole models, specialised by Triton's own JIT. A row: kernel, config (dtypes and constants),
arch, registers and spills (bytes stored to the stack) of a thread, stack_bytes, shared_bytes, occupancy (resident
threads over the most possible), matrix_instructions with their mnemonic, the share of global memory instructions that
move 16 bytes a thread, `loop` (of attention: cycles of a multiprocessor for 64 x 64 scores by unit, and products issued
over products needed; of the GEMM for 64 x 64 outputs and BLOCK_K terms), ceiling_us, the modes that launch it, and
`source`: all that another program needs to compile the same kernel again. ceiling_us is the time at the ceilings of
`roofline.py` of its first launch, on the device that a target stands for: the bytes of the kernel's tensors over the
bandwidth or its products over the peak. Arithmetic, never a measured figure.
"""

import argparse
import collections
import functools
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from internvit.kernels.common.target import TARGETS, Target
from internvit.kernels.tools import roofline
from internvit.kernels.tools.compile_only import Specialization, reason
from internvit.kernels.tools.model_launches import KernelUse, kernel_uses
from internvit.kernels.tools.sass import loop_cost

Row = dict[str, Any]

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_MATRIX_NVIDIA = re.compile(r"\b([HIQ]G?MMA|UTC[HIQ]MMA|OMMA)[.\w]*")
_MATRIX_AMD = re.compile(r"\b(v_(?:s?mfma|wmma)_\w+)")
_GLOBAL_NVIDIA = re.compile(r"\b(?:LDG|STG|LDGSTS)\.([\w.]+)")
_GLOBAL_AMD = re.compile(r"\b(?:global|buffer|flat)_(?:load|store)_(\w+)")
_RESIDENT = {"sm_86": (48, 16), "sm_89": (48, 24), "sm_120": (48, 24)}
"""Warps and programs that a multiprocessor holds at most, where they are not 64 and 32."""


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / name), *args], check=True, capture_output=True, text=True).stdout


def _read_nvidia(compiled: Any, whole: bool) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
        # 0.4 s of a core for the smallest kernel, 0.3 without an analysis that changes no output; ptxas takes 0.1.
        sass = _tool("nvdisasm", "--print-code", "--no-dataflow", cubin.name) if whole or stack else ""
    spills = sum(int(width or 32) // 8 for width in re.findall(r"\bSTL(?:\.(64|128))?\b", sass))
    moves = _GLOBAL_NVIDIA.findall(sass)
    return {
        "registers": registers,
        "spills": spills,
        "stack_bytes": stack,
        "matrix": collections.Counter(_MATRIX_NVIDIA.findall(sass)),
        "wide": [("128" in m.split(".")) for m in moves],
        "sass": sass,
    }


def _read_amd(compiled: Any) -> Row:
    asm = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", asm).group(1))  # type: ignore[union-attr]

    stack = field("private_segment_fixed_size")
    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    return {
        "registers": field("vgpr_count"),
        "spills": 4 * spills if stack else 0,  # without a stack they lie in lanes of other registers
        "stack_bytes": stack,
        "matrix": collections.Counter(_MATRIX_AMD.findall(asm)),
        "wide": [m.startswith(("dwordx4", "b128")) for m in _GLOBAL_AMD.findall(asm)],
    }


def resident_programs(target: Target, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that a multiprocessor holds at a time, as registers, shared memory, warp and program slots allow."""
    if target.is_amd:  # 4 SIMDs; of mfma's 8 waves and 512 registers a lane, of wmma's 16 and 1536
        waves, file, granule = (8, 512, 8) if target.matrix_instructions == "mfma" else (16, 1536, 24)
        by_registers = 4 * min(waves, file // max(granule, granule * math.ceil(registers / granule))) // num_warps
        by_shared = target.shared_bytes // shared_bytes if shared_bytes else 4 * waves
        return min(by_registers, by_shared, 4 * waves // num_warps)
    warps, programs = _RESIDENT.get(target.name, (64, 32))
    per_warp = 256 * math.ceil(registers * 32 / 256)
    by_registers = 65536 // per_warp // num_warps
    by_shared = (target.shared_bytes + 1024) // (shared_bytes + 1024)  # the driver keeps 1 KiB a program
    return min(by_registers, by_shared, warps // num_warps, programs)


def occupancy(target: Target, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Resident warps over the most a multiprocessor holds."""
    warps, _ = _RESIDENT.get(target.name, (64, 32))
    if target.is_amd:
        warps = 32 if target.matrix_instructions == "mfma" else 64
    return resident_programs(target, registers, shared_bytes, num_warps) * num_warps / warps


_KEYS_APART = ("p_cu_seqlens_k", "p_cu_seqlens_q", "N_k", "N_q")
"""Attention's arguments where keys are not the queries' own."""


def _bare(name: str) -> str:
    return name.removeprefix("p_")


def config_of(one: Specialization) -> str:
    """What tells a kernel's specialisations apart: dtypes, constants, None and 1 among the arguments, alignment."""
    types = dict(one.signature)
    constants = dict(one.constants)
    aligned = {one.signature[i][0] for i, attributes in one.attributes if dict(attributes).get("tt.divisibility") == 16}
    dtypes = list(dict.fromkeys(t.removeprefix("*") for t in types.values() if t.startswith("*")))
    parts = ["/".join(dtypes)]
    parts += [f"{name}={value}" for name, value in constants.items() if name.isupper() and value is not None]
    # a pack's int32 cu_seqlens stands among the dtypes; what is not packed, and as many keys as queries, is the rule
    absent = [name for name, value in constants.items() if value is None]
    unusual = [name for name in types if name in _KEYS_APART and name not in absent]
    parts += [f"with {','.join(map(_bare, unusual))}"] if unusual else []
    absent = [_bare(name) for name in absent if name not in ("p_cu_seqlens", *_KEYS_APART)]
    parts += [f"without {','.join(absent)}"] if absent else []
    parts += [f"{name}=1" for name, value in constants.items() if not name.isupper() and value == 1]
    narrow = [name for name, t in types.items() if (t.startswith("*") or "stride" in name) and name not in aligned]
    parts += [f"unaligned {','.join(n for n in narrow if n not in constants)}"] if set(narrow) - set(constants) else []
    parts += [f"{name}%16" for name in types if name in aligned and types[name] == "i32" and "stride" not in name]
    return " ".join([*parts, f"warps={one.num_warps}", f"stages={one.num_stages}"])


def _name(use: KernelUse, target: Target) -> Row:
    """The row of a kernel that is not compiled."""
    one = use.specialization
    return {"kernel": one.function, "config": config_of(one), "arch": target.name, "modes": use.modes}


def profile(use: KernelUse, target: Target, quick: bool = False) -> Row:
    """One row. A kernel that does not compile has `error` instead of what was read from its code.

    `quick` disassembles only kernels with matrix products, and those that keep a stack: others spill nothing, and have
    no `global_16_byte_share`.
    """
    one, row = use.specialization, _name(use, target)
    try:
        compiled = one.compile(target)
    except Exception as error:
        return row | {"error": reason(error)}
    if target.is_amd:
        code = _read_amd(compiled)
    else:
        code = _read_nvidia(compiled, whole=not quick or roofline.multiplies(one.function))
    shared = compiled.metadata.shared
    return row | {
        "registers": code["registers"],
        "spills": code["spills"],
        "stack_bytes": code["stack_bytes"],
        "shared_bytes": shared,
        "occupancy": round(occupancy(target, code["registers"], shared, one.num_warps), 3),
        "matrix_instructions": dict(code["matrix"]),
        "global_16_byte_share": round(sum(code["wide"]) / len(code["wide"]), 3) if code["wide"] else None,
        "loop": _loop(code.get("sass", ""), one, target),
        "ceiling_us": round(1e6 * roofline.seconds(target.name, use.bytes_moved, use.flops), 3),
        "source": asdict(one) | {"target": target.name},
    }


def _loop(sass: str, one: Specialization, target: Target) -> Row | None:
    """The cost of the main loop of a kernel that multiplies matrices (`sass.LoopCost`): for 64 x 64 scores, or for the
    products of BLOCK_K terms of 64 x 64 outputs; None for others."""
    if not roofline.multiplies(one.function) or not sass:
        return None
    constants, products = dict(one.constants), roofline.MATRIX_PRODUCTS.get(one.function, 1)
    tile = constants["BLOCK_M"] * constants["BLOCK_N"]
    depth = constants["BLOCK_K" if one.function in roofline.GEMMS else "BLOCK_D"]
    cost = loop_cost(sass, target, one.num_warps, tile, products, depth)
    return None if cost is None else asdict(cost)


def failures(row: Row) -> Iterator[str]:
    """Why a kernel cannot run on its target as it should: it does not compile, spills, or needs too much memory."""
    where = f"{row['arch']} {row['kernel']}: {row['config']} ({row['modes'][0]})"
    if "error" in row:
        yield f"{where}: does not compile: {row['error']}"
        return
    if row["spills"]:
        yield f"{where}: {row['spills']} bytes spilled"
    if row["shared_bytes"] > (limit := TARGETS[row["arch"]].shared_bytes):
        yield f"{where}: {row['shared_bytes']} bytes of shared memory, the device has {limit}"
    if (
        roofline.multiplies(row["kernel"])
        and not row["matrix_instructions"]
        and "fp32" not in row["config"].split()[0].split("/")[0]
    ):
        yield f"{where}: no matrix instructions"


def profile_uses(
    uses: Iterable[tuple[KernelUse, Target]],
    processes: int | None = None,
    quick: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Row]:
    """A row for each, compiled in `processes` processes, by default one for each core; of part (i, n) every n-th from
    the i-th on is compiled, and the others are named alone."""
    processes = processes or len(os.sched_getaffinity(0))
    pairs = list(uses)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        read = functools.partial(profile, quick=quick)
        mine = pairs[part[0] :: part[1]]
        rows = pool.map(read, [use for use, _ in mine], [target for _, target in mine])
        for i, pair in enumerate(pairs):
            yield next(rows) if i % part[1] == part[0] else _name(*pair)


def profile_all(
    archs: Iterable[str] = TARGETS,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    only: str = "",
    processes: int | None = None,
    quick: bool = False,
    part: tuple[int, int] = (0, 1),
) -> Iterator[Row]:
    """A row per distinct kernel and target; `only` keeps the modes whose name that pattern is found in."""
    dtypes = tuple(dtypes)
    pairs = [(use, TARGETS[arch]) for arch in archs for use in kernel_uses(TARGETS[arch], dtypes, only=only)]
    return profile_uses(pairs, processes, quick, part)


def _part(text: str) -> tuple[int, int]:
    """ "I/N" as numbers."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(match[1]), int(match[2])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m internvit.kernels.tools.static_profile", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default="", help="only modes whose name this pattern is found in, as '6b.*train'")
    parser.add_argument("--processes", type=int, help="that compile; one for each core by default")
    parser.add_argument("--quick", action="store_true", help="disassemble only where products or a stack are")
    parser.add_argument("--part", type=_part, default=(0, 1), help="I/N: every N-th kernel from I on; names the others")
    parser.add_argument("--json", type=Path, help="writes the rows here")
    args = parser.parse_args()
    rows = []
    titles = f"{'regs':>4} {'spills':>6} {'shared':>7} {'occ':>5} {'16B':>5} {'least us':>8} issue/tensor/exp products"
    print(f"{'arch':7} {'kernel':32} {titles} matrix / config")
    dtypes = [getattr(torch, name) for name in args.dtype]
    for row in profile_all(args.arch, dtypes, args.only, args.processes, args.quick, args.part):
        rows.append(row)
        if "registers" not in row and "error" not in row:
            continue
        if "error" in row:
            print(f"{row['arch']:7} {row['kernel']:32} {row['error']} {row['config']}", flush=True)
            continue
        wide = "-" if row["global_16_byte_share"] is None else f"{row['global_16_byte_share']:.2f}"
        loop = row["loop"]
        cycles = "-" if loop is None else "{issue}/{tensor}/{exp} {products}".format(**loop)
        matrix = " ".join(f"{n}x{m}" for m, n in row["matrix_instructions"].items())
        print(
            f"{row['arch']:7} {row['kernel']:32} {row['registers']:4} {row['spills']:6} {row['shared_bytes']:7}"
            f" {row['occupancy']:5.2f} {wide:>5} {row['ceiling_us']:8.2f} {cycles} {matrix} {row['config']}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
