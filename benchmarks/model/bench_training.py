"""What one block costs in training, by what it keeps for backward: memory, FLOPs and time, next to transformers.

    python -m internvit.benchmarks.model.bench_training --out FOLDER   # measures; writes training.json and .csv
    python -m internvit.benchmarks.model.bench_training --report       # writes docs/training.md's table from them

Units are of one [N, C] tensor of the block's dtype, alive between forward and backward: its input counted, its output
not. FLOPs are those of the GEMMs and attention, by torch's counter. A way whose gradients are wrong is not timed.
"""

import argparse
import csv
import dataclasses
import functools
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from internvit import InternViTConfig
from internvit.benchmarks.harness import peers, results
from internvit.benchmarks.harness.cases import MissingPeerError
from internvit.benchmarks.harness.machine_limits import bfloat16_products
from internvit.benchmarks.harness.memory import saved_units
from internvit.benchmarks.harness.timing import Times, freed_pages_kept, seconds_of
from internvit.benchmarks.model.bench_block import In
from internvit.benchmarks.model.bench_model import trained_like
from internvit.benchmarks.reports.table import markdown, ms, replace_section
from internvit.files import atomic_write
from internvit.model.encoder import InternViTEncoder
from internvit.numerics import relative_error

PAGE = results.FOLDER.parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- training: make report -->", "<!-- end of training -->"
VARIANTS = ("internvit-300m-448px", "internvit-6b-448px-v2.5")
WITHOUT = "internvit without recipes"
MODES = {
    WITHOUT: ("none", False),
    'internvit "none" (default)': ("none", False),
    "internvit, LayerScale folded": ("none", True),
    'internvit "selective"': ("selective", False),
    'internvit "block"': ("block", False),
}


@dataclass(frozen=True)
class Row:
    """One way of keeping what backward needs.

    Attributes:
        units, mib: alive between forward and backward.
        flops: backward's over forward's; None where torch's counter does not know the attention.
        gradients: how they compare to those without recipes.
        p20_ms, p50_ms, p80_ms: of forward and backward together.
        over: this way's median over that without recipes.
    """

    shape: str
    dtype: str
    way: str
    units: float
    mib: float
    flops: float | None
    gradients: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    over: float | None = None
    note: str = ""


class Way:
    """A block in training mode, and how to call it."""

    def __init__(self, name: str, module: nn.Module, call: Callable[[Tensor], Tensor]) -> None:
        self.name, self.module, self.call = name, module.train(), call

    def forward(self, x: Tensor) -> Tensor:
        if self.name != WITHOUT:
            return self.call(x)
        with saved_tensors_hooks(lambda t: t, lambda t: t):  # under another's hooks the library leaves no recipes
            return self.call(x)

    def gradients(self, x: Tensor, incoming: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(x), [x, *self.module.parameters()], incoming)


def _last(encoder: InternViTEncoder, x: Tensor) -> Tensor:
    return encoder(x)[0]


def ways(config: InternViTConfig, device: str, dtype: torch.dtype) -> Iterator[Way]:
    weights = {k: v.to(device, dtype) for k, v in trained_like(config).items()}
    for name, (mode, folded) in MODES.items():
        encoder = InternViTEncoder(config, device="meta")
        own = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
        encoder.load_state_dict(own, assign=True)
        encoder.set_gradient_checkpointing(mode)
        encoder.set_layer_scale_folding(folded)
        yield Way(name, encoder, functools.partial(_last, encoder))
    layer = peers.transformers_model(config, weights).encoder.layer[0]
    if dtype == torch.bfloat16 and not bfloat16_products(device):  # emulated, the 6B's block takes minutes
        wide = In(layer, torch.float32)
        yield Way("transformers SDPA, float32", wide, wide)
    else:
        yield Way("transformers SDPA", layer, layer)


def counted_flops(way: Way, x: Tensor, incoming: Tensor, attention: float) -> float | None:
    """Backward's FLOPs over forward's; None where the counter saw no attention."""
    with FlopCounterMode(display=False) as forward:
        y = way.forward(x)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y, [x, *way.module.parameters()], incoming)
    linears = sum(2 * p.numel() for p in way.module.parameters() if p.dim() == 2) * x.shape[0] * x.shape[1]
    if forward.get_total_flops() < linears + 0.99 * attention:
        return None
    return backward.get_total_flops() / forward.get_total_flops()


def measured(
    variant: str, tokens: int, device: str, dtype: torch.dtype, rounds: int, seconds: Callable[[Callable], float]
) -> list[Row]:
    """The rows of one block."""
    config = InternViTConfig.from_name(variant).replace(num_hidden_layers=1, drop_path_rate=0.0, name=None)
    generator = torch.Generator().manual_seed(0)
    shape = (1, tokens, config.hidden_size)
    x = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    incoming = torch.randn(shape, generator=generator).to(device, dtype)
    attention = 4.0 * tokens**2 * config.hidden_size
    rows: list[Row] = []
    ready: dict[str, Way] = {}
    expected: tuple[Tensor, ...] = ()
    try:
        for way in ways(config, device, dtype):
            ready[way.name] = way
            gradients = way.gradients(x, incoming)
            expected = expected or gradients
            verdict, note = "", ""
            if len(gradients) == len(expected) and way.name.startswith("internvit"):
                error = max(relative_error(a, b) for a, b in zip(gradients, expected, strict=True))
                verdict = "the same bits" if all(map(torch.equal, gradients, expected)) else f"within {error:.0e}"
                if not error <= 2 * torch.finfo(dtype).eps:
                    note = f"refused, the gradients are wrong: relative error {error:.1e}"
                    del ready[way.name]
            units = saved_units(way.module, x, way.forward)
            rows.append(
                Row(
                    shape=f"{variant.split('-')[1].upper()} {'x'.join(map(str, shape))}",
                    dtype=str(dtype).removeprefix("torch."),
                    way=way.name,
                    units=round(units, 2),
                    mib=round(units * x.numel() * x.element_size() / 2**20, 1),
                    flops=counted_flops(way, x, incoming, attention),
                    gradients=verdict,
                    note=note,
                )
            )
    except MissingPeerError as gap:
        print(f"transformers: {gap}", file=sys.stderr)
    found: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, way in ready.items():
            found[name].append(seconds(lambda way=way: way.gradients(x, incoming)))
    times = {name: Times(tuple(found[name])) for name in found}
    return [_timed(row, times) for row in rows]


def _timed(row: Row, times: dict[str, Times]) -> Row:
    mine = times.get(row.way)
    if mine is None or not mine.seconds:
        return row
    p20, p50, p80 = (round(mine.quantile(q) * 1e3, 3) for q in (20, 50, 80))
    over = round(mine.median / times[WITHOUT].median, 3)
    return dataclasses.replace(row, p20_ms=p20, p50_ms=p50, p80_ms=p80, over=over)


def cpu_seconds(call: Callable[[], object]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def write(folder: Path, machine: dict[str, Any], rows: list[Row]) -> None:
    """training.json and training.csv, each replaced in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [dataclasses.asdict(row) for row in rows]
    found = {"machine": machine, "rows": lines}
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    for name, content in (("training.json", json.dumps(found, indent=1) + "\n"), ("training.csv", text.getvalue())):
        with atomic_write(folder / name) as part:
            part.write_text(content)


def section() -> str:
    """docs/training.md's tables, from the committed results."""
    parts = []
    for path in sorted(results.FOLDER.glob("*/training.json")):
        found = json.loads(path.read_text())
        machine, rows = found["machine"], [Row(**row) for row in found["rows"]]
        parts.append(f"**{machine['device']}**, torch {machine['torch']}, {machine['clock']}, {results.age(machine)}.")
        for shape in dict.fromkeys(row.shape for row in rows):
            mine = [row for row in rows if row.shape == shape]
            lines = [
                [
                    row.way,
                    f"{row.units:.1f}",
                    f"{row.mib:.0f}",
                    "" if row.flops is None else f"{row.flops:.2f}",
                    row.gradients,
                    row.note or f"{ms(row.p50_ms)} ({ms(row.p20_ms)} - {ms(row.p80_ms)})",
                    "" if row.over is None else f"{row.over:.2f}",
                ]
                for row in mine
            ]
            headings = ("units", "MiB", "backward / forward, FLOPs", "gradients", "forward + backward, ms", "over")
            parts.append(markdown([f"{shape}, {mine[0].dtype}", *headings], lines))
    return "\n\n".join(parts)


def page(text: str) -> str:
    """The page with its tables replaced."""
    return replace_section(text, PAGE.name, BEGIN, END, section())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internvit.benchmarks.model.bench_training", description=__doc__)
    parser.add_argument("--out", type=Path, help="where training.json and training.csv go")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="257 tokens of the 300M, one round")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of one thread: for a machine that is not idle"
    )
    parser.add_argument("--report", action="store_true", help="only write docs/training.md from committed results")
    asked = parser.parse_args(arguments)
    if asked.report:
        with atomic_write(PAGE) as part:
            part.write_text(page(PAGE.read_text()))
        return 0
    if asked.cpu_time:
        torch.set_num_threads(1)
    threads = torch.get_num_threads()
    wall = "" if asked.device != "cpu" else f" on {threads} threads"
    clock = "CPU time of one thread, beside other work" if asked.cpu_time else f"interleaved medians{wall}"
    seconds = cpu_seconds if asked.cpu_time else lambda call: seconds_of(call, 1, asked.device)
    rows: list[Row] = []
    for variant in VARIANTS[: 1 if asked.quick else 2]:
        tokens, rounds = (257, 1) if asked.quick else (1025, asked.rounds)
        with freed_pages_kept():
            rows += measured(variant, tokens, asked.device, torch.bfloat16, rounds, seconds)
        for row in rows:
            print(row)
        if asked.out is not None:
            write(asked.out, results.machine(asked.device) | {"clock": clock}, rows)
    return int(any(row.note for row in rows))


if __name__ == "__main__":
    sys.exit(main())
