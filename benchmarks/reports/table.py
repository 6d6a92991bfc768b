"""Results as tables: in the terminal, and as the Markdown that README and docs hold."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from internvit.benchmarks.harness.results import Change, Results, Row


def grouped(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows of the same work, fastest first; what was not timed last."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.work, []).append(row)
    return {work: sorted(g, key=lambda r: (r.p50_ms is None, r.p50_ms or 0.0)) for work, g in groups.items()}


def ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def cells(row: Row) -> list[str]:
    """What a row prints: way, p50, p20-p80, how many times ours is faster, error, peak memory, share of the limit."""
    if row.p50_ms is None:
        return [row.variant, "-", "", "", "", "", row.note]
    return [
        row.variant,
        ms(row.p50_ms),
        f"{ms(row.p20_ms)} - {ms(row.p80_ms)}",
        "" if row.speedup is None else f"{row.speedup:.2f}",
        "" if row.error is None else f"{row.error:.2%}",
        "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
        "" if row.share is None else f"{100 * row.share:.0f} % of {row.limit}",
    ]


HEADINGS = ("way", "p50, ms", "p20 - p80", "ours is × faster", "error", "peak, MiB", "share of the measured limit")


def heading(work: tuple[str, ...]) -> str:
    bench, shape, dtype, mode, launch = work
    return f"{bench} {shape}, {dtype}, {mode}{', CUDA graph' if launch != 'eager' else ''}"


def plain(results: Results) -> str:
    """Everything as text, for a machine without rich."""
    lines = [f"{results.machine['device']}, {results.machine['threads']} threads, torch {results.machine['torch']}"]
    for work, rows in grouped(results.rows).items():
        lines += ["", heading(work)]
        table = [list(HEADINGS), *map(cells, rows)]
        widths = [max(len(line[i]) for line in table) for i in range(len(HEADINGS))]
        lines += ["  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join(lines)


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_section(text: str, name: str, begin: str, end: str, section: str) -> str:
    """`text` of the page `name` with what stands between the markers replaced."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"{name}: expected the markers {begin} and {end}")
    return f"{before}{begin}\n\n{section}\n\n{end}{after}"


def write_page(page: Path, text: str, description: str | None, command: str) -> int:
    """The command of a page that is `text`, as `python -m` runs it: writes the page, or with --check compares it."""
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is out of date")
    if not parser.parse_args().check:
        page.write_text(text)
    elif not page.exists() or page.read_text() != text:
        print(f"{page.name} is out of date: python -m {command}", file=sys.stderr)
        return 1
    return 0


def changes_as_text(changes: list[Change]) -> str:
    """What got slower or faster beyond the spread, and how many rows did neither."""
    lines = []
    for change in changes:
        if change.verdict in ("slower", "faster"):
            *work, variant = change.key
            lines.append(
                f"{change.verdict}: {heading(tuple(work))}, {variant}: "
                f"{ms(change.old_ms)} -> {ms(change.new_ms)} ms ({change.ratio:.2f} x)"
            )
    same = sum(change.verdict not in ("slower", "faster") for change in changes)
    return "\n".join([*lines, f"{len(changes)} rows in both, {same} within the spread"])
