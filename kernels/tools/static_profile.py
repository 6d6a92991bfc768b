"""Compiles every kernel ahead of time, without a GPU, and reports what the compiler made of it.

    python -m internvit.kernels.tools.static_profile [--arch sm_90 ...] [--dtype bfloat16 ...] [--json FILE]

The ops run on `meta` tensors of InternViT's shapes while their launches are recorded, so what is compiled is what a
device would be asked to run. A row: kernel, config (op, model, dtype, tile), arch, registers and spills (bytes stored
to the stack) of a thread, stack_bytes, shared_bytes, occupancy (resident threads over the most possible),
matrix_instructions with their mnemonic, the share of global memory instructions that move 16 bytes a thread,
ceiling_us, and `source`: all that another program needs to compile the same kernel again. ceiling_us is the time at
the ceilings of `ceilings.py` for 2 x 1025 tokens, on the device that a target stands for (A100, H100, B200, MI300X):
the bytes of the kernel's tensors over the bandwidth or its products over the peak. Arithmetic, never a measured figure.
"""

import argparse
import collections
import functools
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from internvit.kernels.common.launch import TARGETS, Launch, Target, record
from internvit.kernels.tools.roofline import kernel_seconds
from internvit.ops.backends.registry import implementation

Row = dict[str, Any]

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_MATRIX_NVIDIA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA|OMMA)[.\w]*")
_MATRIX_AMD = re.compile(r"\b(v_mfma_\w+)")
_GLOBAL_NVIDIA = re.compile(r"\b(?:LDG|STG|LDGSTS)\.([\w.]+)")
_GLOBAL_AMD = re.compile(r"\b(?:global|buffer|flat)_(?:load|store)_(\w+)")


def _argument(value: Any) -> tuple[str, Any, bool]:
    """A kernel argument's type, its value where the launcher specialises on it, and whether 16 divides it."""
    if value is None:
        return "constexpr", None, False
    if isinstance(value, Tensor):
        aligned = int(value.storage_offset()) * value.element_size() % 16 == 0
        return f"*{_TYPES[value.dtype]}", None, aligned
    if isinstance(value, float):
        return "fp32", None, False
    if value == 1:
        return "constexpr", 1, False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), None, value % 16 == 0


def describe(launch: Launch) -> Row:
    """`launch` as plain data: what `compile_row` and any other program compile it from."""
    names = launch.kernel.arg_names
    signature, constants, divisible = {}, dict(launch.constants), []
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        signature[name], constant, by_16 = _argument(value)
        if signature[name] == "constexpr":
            constants[name] = constant
        if by_16:
            divisible.append(i)
    signature |= dict.fromkeys(names[len(launch.args) :], "constexpr")
    return {
        "module": launch.kernel.fn.__module__,
        "function": launch.kernel.fn.__name__,
        "signature": signature,
        "constants": constants,
        "divisible_by_16": divisible,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }


def _gpu_target(target: Target) -> GPUTarget:
    if target.is_amd:
        return GPUTarget("hip", target.name, target.warp_size)
    return GPUTarget("cuda", int(target.name.removeprefix("sm_")), target.warp_size)


def compile_launch(launch: Launch, target: Target) -> Any:
    source = describe(launch)
    return triton.compile(
        ASTSource(
            launch.kernel,
            source["signature"],
            {(launch.kernel.arg_names.index(name),): value for name, value in source["constants"].items()},
            {(i,): [["tt.divisibility", 16]] for i in source["divisible_by_16"]},
        ),
        target=_gpu_target(target),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / name), *args], check=True, capture_output=True, text=True).stdout


def _read_nvidia(compiled: Any) -> Row:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("nvdisasm", "--print-code", cubin.name)
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    spills = sum(int(width or 32) // 8 for width in re.findall(r"\bSTL(?:\.(64|128))?\b", sass))
    moves = _GLOBAL_NVIDIA.findall(sass)
    return {
        "registers": registers,
        "spills": spills,
        "stack_bytes": stack,
        "matrix": collections.Counter(_MATRIX_NVIDIA.findall(sass)),
        "wide": [("128" in m.split(".")) for m in moves],
    }


def _read_amd(compiled: Any) -> Row:
    asm = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", asm).group(1))  # type: ignore[union-attr]

    return {
        "registers": field("vgpr_count"),
        "spills": 4 * (field("vgpr_spill_count") + field("sgpr_spill_count")),
        "stack_bytes": field("private_segment_fixed_size"),
        "matrix": collections.Counter(_MATRIX_AMD.findall(asm)),
        "wide": [m.startswith("dwordx4") for m in _GLOBAL_AMD.findall(asm)],
    }


def occupancy(target: Target, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Resident warps over the most a multiprocessor holds, as registers, shared memory and program slots allow."""
    if target.is_amd:  # 4 SIMDs of 8 waves and 512 registers a lane, in granules of 8; 64 KiB a compute unit
        by_registers = 4 * min(8, 512 // max(8, 8 * math.ceil(registers / 8))) // num_warps
        by_shared = target.shared_bytes // shared_bytes if shared_bytes else 32
        return min(by_registers, by_shared, 32 // num_warps) * num_warps / 32
    per_warp = 256 * math.ceil(registers * 32 / 256)
    by_registers = 65536 // per_warp // num_warps
    by_shared = (target.shared_bytes + 1024) // (shared_bytes + 1024)  # the driver keeps 1 KiB a program
    return min(by_registers, by_shared, 64 // num_warps, 32) * num_warps / 64


def profile(launch: Launch, target: Target, config: str) -> Row:
    compiled = compile_launch(launch, target)
    found = (_read_amd if target.is_amd else _read_nvidia)(compiled)
    shared = compiled.metadata.shared
    tensors = [a for a in launch.args if isinstance(a, Tensor)]
    return {
        "kernel": launch.kernel.fn.__name__,
        "config": config,
        "arch": target.name,
        "registers": found["registers"],
        "spills": found["spills"],
        "stack_bytes": found["stack_bytes"],
        "shared_bytes": shared,
        "occupancy": round(occupancy(target, found["registers"], shared, launch.num_warps), 3),
        "matrix_instructions": dict(found["matrix"]),
        "global_16_byte_share": round(sum(found["wide"]) / len(found["wide"]), 3) if found["wide"] else None,
        "ceiling_us": round(1e6 * kernel_seconds(target.name, launch.kernel.fn.__name__, tensors), 3),
        "source": describe(launch) | {"target": target.name},
    }


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _triton(op: str, *args: Any) -> Any:
    return implementation(op, "triton")(*args)


def _norms(op: str, channels: int, dtype: torch.dtype) -> None:
    x, weight = _meta(2, 1025, channels, dtype=dtype), _meta(channels, dtype=dtype)
    if op == "rms_norm":
        y, rstd = _triton(op, x, weight, 1e-6, "fused")
        _triton(f"{op}_backward", y, x, weight, rstd, (True, True))
    else:
        y, mean, rstd = _triton(op, x, weight, weight, 1e-6)
        _triton(f"{op}_backward", y, x, weight, mean, rstd, (True, True, True))


def _residuals(kind: str, channels: int, dtype: torch.dtype) -> None:
    x, gamma = _meta(2, 1025, channels, dtype=dtype), _meta(channels, dtype=dtype)
    row_scale = _meta(2, dtype=torch.float32)
    _triton("layer_scale_residual", x, x, gamma, row_scale)
    _triton("layer_scale_residual_backward", x, x, gamma, row_scale, dtype, (True, True))
    bias = gamma if kind == "layer_norm" else None
    outputs = _triton("layer_scale_residual_norm", x, x, gamma, row_scale, gamma, bias, 1e-6, kind, "fused")
    mask = (True, True, True, True, kind == "layer_norm")
    args = (x, x, outputs[0], x, gamma, row_scale, gamma, *outputs[2:], kind, mask)
    _triton("layer_scale_residual_norm_backward", *args)


def _qk_norm(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, _ = _meta(2, 1025, 3, heads, head_dim, dtype=dtype).unbind(2)
    weight = _meta(heads * head_dim, dtype=dtype)
    rstd = _triton("qk_norm_stats", q, k, 1e-6)
    _triton("qk_norm_stats_backward", *rstd, q, k, *rstd, q, k)
    outputs = _triton("qk_norm", q, k, weight, weight, 1e-6, "fused")
    _triton("qk_norm_backward", *outputs[:2], q, k, weight, weight, *rstd, (True,) * 4)


def _attention(heads: int, head_dim: int, folded: bool, dtype: torch.dtype) -> None:
    q, k, v = _meta(2, 1025, 3, heads, head_dim, dtype=dtype).unbind(2)
    weight, rstd = _meta(heads * head_dim, dtype=dtype), _meta(2, 1025, dtype=torch.float32)
    norm = (weight, weight, rstd, rstd) if folded else (None,) * 4
    out, lse = _triton("attention", q, k, v, 0.125, *norm)
    _triton("attention_backward", out, q, k, v, out, lse, 0.125, *norm, q, k, v)


def _gelu(channels: int, dtype: torch.dtype) -> None:
    z = _meta(2, 1025, channels, dtype=dtype)
    _triton("gelu_backward", _triton("gelu", z), z)


def cases() -> Iterator[tuple[str, Callable[[torch.dtype], None]]]:
    """(name, ops forward and backward on meta tensors) at each model's shapes."""
    for model, heads, head_dim, norm in (("6B", 25, 128, "rms_norm"), ("300M", 16, 64, "layer_norm")):
        channels = heads * head_dim
        yield f"{model} {norm}", functools.partial(_norms, norm, channels)
        yield f"{model} layer_scale_residual_norm", functools.partial(_residuals, norm, channels)
        yield f"{model} attention", functools.partial(_attention, heads, head_dim, model == "6B")
        yield f"{model} gelu", functools.partial(_gelu, 4 * channels)
    yield "6B qk_norm", functools.partial(_qk_norm, 25, 128)


def _tile(launch: Launch) -> str:
    tile = [f"{k}={v}" for k, v in launch.constants.items() if isinstance(v, int)]
    return " ".join([*tile, f"warps={launch.num_warps}", f"stages={launch.num_stages}"])


def profile_all(
    archs: Iterable[str] = TARGETS, dtypes: Iterable[torch.dtype] = (torch.bfloat16,), only: str = ""
) -> Iterator[Row]:
    """A row per distinct kernel, launch choice and target; `only` keeps the cases whose name contains it."""
    for arch in archs:
        seen: set[str] = set()
        for name, run in cases():
            for dtype in dtypes if only in name else ():
                with record(TARGETS[arch]) as launches:
                    run(dtype)
                for launch in launches:
                    key = json.dumps(describe(launch), sort_keys=True)
                    if key not in seen:
                        seen.add(key)
                        short = str(dtype).removeprefix("torch.")
                        yield profile(launch, TARGETS[arch], f"{name} {short} {_tile(launch)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m internvit.kernels.tools.static_profile", description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--only", default="", help="only cases whose name contains this, as '6B' or 'rms_norm'")
    parser.add_argument("--json", type=Path, help="writes the rows here")
    args = parser.parse_args()
    rows = []
    titles = f"{'regs':>4} {'spills':>6} {'shared':>7} {'occ':>5} {'16B':>5} {'least us':>8}"
    print(f"{'arch':7} {'kernel':32} {titles} matrix / config")
    for row in profile_all(args.arch, [getattr(torch, d) for d in args.dtype], args.only):
        rows.append(row)
        wide = "-" if row["global_16_byte_share"] is None else f"{row['global_16_byte_share']:.2f}"
        matrix = " ".join(f"{n}x{m}" for m, n in row["matrix_instructions"].items())
        print(
            f"{row['arch']:7} {row['kernel']:32} {row['registers']:4} {row['spills']:6} {row['shared_bytes']:7}"
            f" {row['occupancy']:5.2f} {wide:>5} {row['ceiling_us']:8.2f} {matrix} {row['config']}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
