"""`internvit bench`: times of ops, blocks and models on this machine, next to peers."""

from pathlib import Path
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

out = Console(soft_wrap=False)


def _names(value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(name.strip() for name in value.split(",") if name.strip())


@click.command()
@click.argument("benches", nargs=-1)
@click.option("--quick", is_flag=True, help="Small shapes and few rounds: a minute or two, to see that it works.")
@click.option("--device", help="cpu or cuda; the GPU if there is one.")
@click.option("--peers", help="Only these peers, comma-separated: eager, SDPA, timm, 'transformers SDPA', …; 'none'.")
@click.option("--rounds", type=click.IntRange(1), help="How often each way runs; 15 for ops, 5 for models by default.")
@click.option("--out", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write JSON, CSV and PNG here.")
@click.option("--compare", nargs=2, type=click.Path(exists=True, path_type=Path), help="OLD NEW: what got slower.")
def bench(
    benches: tuple[str, ...],
    quick: bool,
    device: str | None,
    peers: str | None,
    rounds: int | None,
    folder: Path | None,
    compare: tuple[Path, Path] | None,
) -> None:
    """Time BENCHES (all of them by default) and their peers; what breaks the numerics contract is not timed.

    Every way of doing a piece of work runs in turn, in one process, on inputs larger than the last-level cache. Exit
    code 1 if a result was wrong, or with --compare if anything got slower beyond its spread. Ctrl-C keeps what was
    measured.

    \b
    Examples:
      internvit bench --quick
      internvit bench attention layer_scale_residual_norm --out results
      internvit bench model --peers timm,'transformers SDPA'
      internvit bench --compare old/bench.json new/bench.json
    """
    from internvit.benchmarks.harness import results as files
    from internvit.benchmarks.harness.cases import Setting
    from internvit.benchmarks.harness.run import BENCHES, run
    from internvit.benchmarks.reports import table

    if compare is not None:
        changes = files.compare(*map(files.read, compare))
        click.echo(table.changes_as_text(changes))
        raise SystemExit(any(change.verdict == "slower" for change in changes))
    unknown = [name for name in benches if name not in BENCHES]
    if unknown:
        raise click.UsageError(f"BENCHES: expected {', '.join(BENCHES)}, got {', '.join(unknown)}")
    device = device or _device()
    bar: Any = None

    def wrap(steps: list) -> Any:
        nonlocal bar
        bar = tqdm(steps, unit="work", disable=None)
        return bar

    def progress(text: str) -> None:
        if bar is not None:
            bar.set_description_str(text)

    asked = () if peers == "none" else _names(peers)
    found = run(benches or BENCHES, Setting(device, quick), asked, rounds, folder, progress, wrap)
    show(found)
    if folder is not None:
        from internvit.benchmarks.reports.plots import draw

        pictures = draw(found, folder)
        click.echo(f"{folder}: bench.json, bench.csv, {', '.join(path.name for path in pictures)}")
    if not found.complete:
        click.echo("interrupted: this is what was measured before", err=True)
        raise SystemExit(130)
    refused = [row for row in found.rows if row.note.startswith("refused")]
    for row in refused:
        click.echo(f"{table.heading(row.work)}, {row.variant}: {row.note}", err=True)
    if refused:
        raise SystemExit(1)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def show(results: Any) -> None:
    """Prints everything measured."""
    from internvit.benchmarks.reports import table

    machine, limits = results.machine, results.limits
    rates = ", ".join(f"{name} GEMM {rate / 1e12:.3g} TFLOP/s" for name, rate in limits["gemm"].items())
    out.print(f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}", highlight=False)
    peaks = "".join(f", {name} peak {rate / 1e12:.3g} TFLOP/s" for name, rate in limits.get("peak", {}).items())
    copy = f"copy {limits['bandwidth'] / 1e9:.3g} GB/s"
    out.print(f"limits measured in this run: {copy}, {rates}{peaks}", highlight=False)
    for work, rows in table.grouped(results.rows).items():
        drawn = Table(*table.HEADINGS, title=escape(table.heading(work)), title_justify="left", box=box.SIMPLE_HEAD)
        for row in rows:
            cells = [escape(cell) for cell in table.cells(row)]
            style = "red" if row.note.startswith("refused") else "bold" if row.variant.startswith("internvit") else ""
            drawn.add_row(*cells, style=style)
        out.print(drawn)
    if results.call_us:
        calls = ", ".join(f"{op} {us:.0f}" for op, us in results.call_us.items())
        out.print(f"cost of a call on one row, µs: {calls}", highlight=False)
