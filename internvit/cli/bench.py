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
@click.option("--rounds", type=click.IntRange(1), help="Runs of each; 15 for ops, 5 for models by default.")
@click.option("--out", "folder", type=click.Path(file_okay=False, path_type=Path), help="Write JSON, CSV and PNG here.")
@click.option("--base", metavar="REF", help="Time this git revision as well: what got slower since. Builds it.")
@click.option("--compare", nargs=2, type=click.Path(exists=True, path_type=Path), help="OLD NEW: what got slower.")
def bench(
    benches: tuple[str, ...],
    quick: bool,
    device: str | None,
    peers: str | None,
    rounds: int | None,
    folder: Path | None,
    base: str | None,
    compare: tuple[Path, Path] | None,
) -> None:
    """Time BENCHES (all of them by default) and their peers; an implementation with wrong results is not timed.

    All implementations of a case run in turn, in one process, on inputs larger than the last-level cache. The exit code
    is 1 if a result was wrong, or with --compare or --base if anything got slower beyond its spread. After Ctrl-C the
    results measured so far are kept.

    \b
    Examples:
      internvit bench --quick
      internvit bench attention layer_scale_residual_norm --out results
      internvit bench model --peers timm,'transformers SDPA'
      internvit bench --compare old/bench.json new/bench.json
      internvit bench rms_norm model --peers none --base v0.1.0
    """
    from internvit.benchmarks.harness.cases import Setting
    from internvit.benchmarks.harness.run import BENCHES, run

    if compare is not None:
        _compare(*compare)
    unknown = [name for name in benches if name not in BENCHES]
    if unknown:
        raise click.UsageError(f"BENCHES: expected {', '.join(BENCHES)}, got {', '.join(unknown)}")
    if base is not None:
        if folder is not None or compare is not None:
            raise click.UsageError("--base: compares with a revision, --out and --compare have no meaning beside it")
        _compare_with(base, [*benches, *_given(quick, device, peers, rounds)])
    chosen = () if peers == "none" else _names(peers)
    progress = _Progress()
    setting = Setting(device or _device(), quick)
    results = run(benches or BENCHES, setting, chosen, rounds, folder, progress.describe, progress.wrap)
    show(results)
    if folder is not None:
        from internvit.benchmarks.reports.plots import draw

        pictures = draw(results, folder)
        click.echo(f"{folder}: bench.json, bench.csv, {', '.join(path.name for path in pictures)}")
    _exit_code(results)


class _Progress:
    """A progress bar over the list of steps that the harness hands out."""

    def __init__(self) -> None:
        self.bar: Any = None

    def wrap(self, steps: list) -> Any:
        self.bar = tqdm(steps, unit="case", disable=None)
        return self.bar

    def describe(self, text: str) -> None:
        if self.bar is not None:
            self.bar.set_description_str(text)


def _given(quick: bool, device: str | None, peers: str | None, rounds: int | None) -> list[str]:
    """The options as another call takes them."""
    options = {"--device": device, "--peers": peers, "--rounds": rounds}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return [*given, *(["--quick"] if quick else [])]


def _compare_with(ref: str, arguments: list[str]) -> None:
    from internvit.benchmarks.harness import revision

    _changes(*revision.measured(ref, arguments, lambda text: click.echo(text, err=True)))


def _compare(old: Path, new: Path) -> None:
    from internvit.benchmarks.harness import results as files

    _changes(files.read(old), files.read(new))


def _changes(old: Any, new: Any) -> None:
    """Prints what changed between two results, and exits with 1 if anything is slower."""
    from internvit.benchmarks.harness import results as files
    from internvit.benchmarks.reports import table

    changes = files.compare(old, new)
    click.echo(table.changes_as_text(changes))
    raise SystemExit(any(change.verdict == "slower" for change in changes))


def _exit_code(results: Any) -> None:
    """Exits with 130 after Ctrl-C, and with 1 if a result was wrong."""
    from internvit.benchmarks.reports import table

    if not results.complete:
        click.echo("interrupted: this is what was measured before", err=True)
        raise SystemExit(130)
    refused = [row for row in results.rows if row.note.startswith("refused")]
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
