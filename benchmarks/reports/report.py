"""README's tables, each machine's table of ops and docs' pictures, from the committed results: `make report`.

    python -m internvit.benchmarks.reports.report [--check]

Whatever stands between the markers in README.md, and benchmarks/results/*/README.md, is written from
benchmarks/results/*/bench.json; `--check` writes nothing and exits 1 where they disagree.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from internvit.benchmarks.harness.results import FOLDER, Results, Row, read
from internvit.benchmarks.reports.table import markdown, ms, replace_section
from internvit.files import atomic_write

ROOT = FOLDER.parents[1]
_IN_README = ("model", "block")
BEGIN, END = "<!-- results: make report -->", "<!-- end of results -->"


def all_results() -> dict[str, Results]:
    """Folder name -> results, by name."""
    return {path.parent.name: read(path) for path in sorted(FOLDER.glob("*/bench.json"))}


def _best(rows: Iterable[Row], ours: bool) -> Row | None:
    timed = [r for r in rows if r.p50_ms is not None and r.variant.startswith("internvit") == ours]
    return min(timed, key=lambda r: r.p50_ms or 0.0, default=None)


def _groups(results: Results, benches: tuple[str, ...]) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in results.rows:
        if row.bench in benches and row.launch == "eager":
            groups.setdefault(row.work, []).append(row)
    return groups


def ways(results: Results, bench: str) -> str:
    """A line a way, a column a piece of work: medians, and how many times the fastest of ours is faster."""
    groups = {work: rows for work, rows in _groups(results, (bench,)).items() if _best(rows, True)}
    if not groups:
        return ""
    names = list(dict.fromkeys(row.variant for rows in groups.values() for row in rows))

    def cell(rows: list[Row], name: str) -> str:
        row = next((r for r in rows if r.variant == name), None)
        if row is None or row.p50_ms is None:
            return "" if row is None else f"- ({row.note})"
        factor = "" if name.startswith("internvit") or row.speedup is None else f" ({row.speedup:.2f} ×)"
        return f"{ms(row.p50_ms)} ms{factor}"

    headings = [f"{work[1]}, {work[2]}, {work[3]}" for work in groups]
    lines = [[f"`{n}`" if n.startswith("internvit") else n, *(cell(g, n) for g in groups.values())] for n in names]
    return markdown([bench, *headings], lines)


def against_best(results: Results, benches: tuple[str, ...]) -> str:
    """A line a piece of work: our median, the best peer's, the ratio, and the share of the measured limit."""
    lines = []
    for (bench, shape, dtype, mode, _), rows in _groups(results, benches).items():
        ours, peer = _best(rows, True), _best(rows, False)
        if ours is None or peer is None or not ours.p50_ms or not peer.p50_ms:
            continue
        share = "" if ours.share is None else f"{100 * ours.share:.0f} % of {ours.limit}"
        ratio = f"{peer.p50_ms / ours.p50_ms:.2f} ×"
        work = f"`{bench}` {shape}, {dtype}, {mode}"
        lines.append([work, ms(ours.p50_ms), f"{peer.variant}: {ms(peer.p50_ms)}", ratio, share])
    return (
        markdown(["work", "ours, ms", "best peer, ms", "ours is faster", "share of the limit"], lines) if lines else ""
    )


def summary(name: str, results: Results) -> str:
    """What README says of one machine."""
    machine = results.machine
    parts = [
        f"**{machine['device']}**, {machine['threads']} threads, torch {machine['torch']}, {machine['time'][:10]}; "
        f"medians, in brackets over the fastest of ours "
        f"([every row, with spread, memory and share of the limits](benchmarks/results/{name}/bench.csv)):",
        f"![Medians and spread of every way](docs/results/{name}.png)",
        ways(results, "model"),
        ways(results, "block"),
    ]
    if ops_table(results):
        parts.append(f"[The rest next to the best peer, one by one](benchmarks/results/{name}/README.md)")
    return "\n\n".join(part for part in parts if part)


def ops_table(results: Results) -> str:
    """Everything but models and blocks next to the best peer."""
    return against_best(results, tuple(dict.fromkeys(r.bench for r in results.rows if r.bench not in _IN_README)))


def pages() -> dict[Path, str]:
    """The files that are written from the results: README, and each machine's table of ops."""
    readme = ROOT / "README.md"
    found = {readme: with_section(readme.read_text())}
    for name, results in all_results().items():
        table = ops_table(results)
        if table:
            found[FOLDER / name / "README.md"] = f"# {results.machine['device']}: next to the best peer\n\n{table}\n"
    return found


def section() -> str:
    """Everything between the markers."""
    return "\n\n".join(summary(name, results) for name, results in all_results().items())


def with_section(readme: str) -> str:
    """README's text with its results replaced."""
    return replace_section(readme, "README.md", BEGIN, END, section())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internvit.benchmarks.reports.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where README and results disagree")
    asked = parser.parse_args(arguments)
    old = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    if asked.check:
        for path in old:
            print(f"{path.relative_to(ROOT)} and the results disagree: make report", file=sys.stderr)
        return int(bool(old))
    for path, text in pages().items():
        with atomic_write(path) as part:
            part.write_text(text)
    from internvit.benchmarks.reports.plots import bars

    pictures = Path(ROOT / "docs" / "results")
    pictures.mkdir(exist_ok=True)
    for name, results in all_results().items():
        made = bars(results, "model", pictures / f"{name}.png")
        print(f"{name}: {len(results.rows)} rows{f', {made.relative_to(ROOT)}' if made else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
