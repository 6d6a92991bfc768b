"""Where the time of a forward goes on this CPU, by kernel, and what share of its own limit each kernel reaches.

    python -m internvit.benchmarks.reports.profile_forward [--images 1] [--size 448] [--out FOLDER]    FOLDER/where.json

InternViT-300M in bfloat16, as `optimize_for_inference` runs it and as it is, under torch's profiler; medians over
several forwards. A kernel's limit is the machine's peak (measured from registers and L1 in the same run) for what
multiplies, and its copy bandwidth for what only moves.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from internvit import InternViT, InternViTConfig, optimize_for_inference
from internvit.benchmarks.harness import machine_limits, results
from internvit.benchmarks.model.bench_model import trained_like
from internvit.files import atomic_write

FAMILIES = (
    (
        "Linears",
        (
            *("linear_pointwise", "linear_packed", "linear_int8", "mkldnn_linear", "addmm", "linear_gelu"),
            *("aten::linear", "mm"),
        ),
    ),
    ("attention", ("attention",)),
    ("norms, residuals", ("norm", "layer_scale")),
    ("patch embedding", ("conv",)),
)


def family(op: str) -> str:
    return next((name for name, parts in FAMILIES if any(part in op for part in parts)), "rest")


def by_family(call: Callable[[], Any], rounds: int) -> tuple[dict[str, float], float]:
    """Milliseconds of each family (medians of `rounds` forwards), and of the whole forward."""
    found: dict[str, list[float]] = defaultdict(list)
    totals = []
    call()
    for _ in range(rounds):
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as trace:
            call()
        spent: dict[str, float] = defaultdict(float)
        for event in trace.key_averages():
            spent[family(event.key)] += event.self_cpu_time_total / 1e3
        for name, ms in spent.items():
            found[name].append(ms)
        totals.append(sum(spent.values()))
    return {name: statistics.median(ms) for name, ms in found.items()}, statistics.median(totals)


def least(config: InternViTConfig, images: int, tokens: int, limits: machine_limits.Limits) -> dict[str, float]:
    """The milliseconds that each family could take at the machine's limits, in bfloat16."""
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    peak = limits.peak.get("bfloat16") or limits.gemm["bfloat16"]
    unit = images * tokens * width * 2  # bytes of one [N, C]
    return {
        "Linears": 1e3 * layers * images * 2.0 * tokens * width * (4 * width + 2 * inner) / peak,
        "attention": 1e3 * layers * images * 4.0 * tokens**2 * width / peak,
        "norms, residuals": 1e3 * layers * 4.0 * unit / limits.bandwidth,  # two norms, each in and out
    }


def measure(images: int, size: int, rounds: int, layers: int | None = None) -> dict[str, Any]:
    name = "internvit-300m-448px"
    changes = {} if layers is None else {"num_hidden_layers": layers}
    config = InternViTConfig.from_name(name, drop_path_rate=0.0, image_size=size, **changes)
    model = InternViT(config, device="meta")
    model.load_state_dict({k: v.bfloat16() for k, v in trained_like(config).items()}, assign=True)
    model.eval()
    fast = optimize_for_inference(model)
    pixels = torch.randn(images, 3, size, size).bfloat16()
    limits = machine_limits.measure("cpu", (torch.bfloat16,), False)
    bounds = least(config, images, config.num_tokens, limits)
    found: dict[str, Any] = {"machine": results.machine("cpu"), "images": images, "size": size, "ways": {}}
    found["peak TFLOP/s"], found["copy GB/s"] = limits.peak.get("bfloat16", 0) / 1e12, limits.bandwidth / 1e9
    ways: dict[str, Callable[[Tensor], Any]] = {"optimize_for_inference": fast, "InternViT": model}
    for way, run in ways.items():
        spent, total = by_family(lambda run=run: run(pixels), rounds)  # type: ignore[misc]
        found["ways"][way] = {"total ms": total, "kernels": {}}
        for part, ms in sorted(spent.items(), key=lambda item: -item[1]):
            share = bounds[part] / ms if part in bounds else None
            found["ways"][way]["kernels"][part] = {"ms": ms, "of the time": ms / total, "of its limit": share}
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown: what each kernel takes, and the share of its limit."""
    lines = []
    for way, row in found["ways"].items():
        lines += [f"| {way}: {row['total ms']:.0f} ms | ms | of the time | of its limit |", "|---|---|---|---|"]
        for part, cells in row["kernels"].items():
            share = "" if cells["of its limit"] is None else f"{cells['of its limit']:.0%}"
            lines.append(f"| {part} | {cells['ms']:.1f} | {cells['of the time']:.1%} | {share} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m internvit.benchmarks.reports.profile_forward", description=__doc__)
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--size", type=int, default=448, help="pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="blocks to run, all by default")
    parser.add_argument("--out", type=Path, help="folder for where.json")
    asked = parser.parse_args(arguments)
    found = measure(asked.images, asked.size, asked.rounds, asked.layers)
    print(table(found))
    if asked.out is not None:
        asked.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(asked.out / "where.json") as partial:
            partial.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
