"""README's table and docs' page of results with its pictures, from the results: `make report`.

    python -m internvit.benchmarks.reports.report [--check]

What stands between the markers in README.md, and docs/results.md, are written from benchmarks/results/*/bench.json and
where.json; `--check` writes nothing and exits 1 where they disagree. Results of other code than today's are marked.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from internvit.benchmarks.harness.results import FOLDER, Results, Row, age, read
from internvit.benchmarks.reports import profile_forward
from internvit.benchmarks.reports.table import markdown, ms, replace_section
from internvit.files import atomic_write

ROOT = FOLDER.parents[1]
_WHOLE = ("model", "block")
BEGIN, END = "<!-- results: make report -->", "<!-- end of results -->"
_HEAD = """# Results

Written by `make report` from `benchmarks/results/`. [How to measure](benchmarks.md) says what is checked before a time
is printed and how to read the tables. No GPU has run this library; what its GPU code is predicted to do is on
[another page](gpu-kernels.md)."""


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


def where(path: Path) -> str:
    """Where a forward's time goes, from a machine's where.json."""
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    machine, peak, copy = found["machine"], found["peak TFLOP/s"], found["copy GB/s"]
    return (
        f"Where the 300M's forward goes, {found['size']} px, batch {found['images']}, bfloat16, {age(machine)}. "
        f"Limits: {peak:.3g} TFLOP/s from registers and L1 for Linears and attention, {copy:.0f} GB/s of copying for "
        f"norms.\n\n{profile_forward.table(found)}"
    )


def summary(name: str, results: Results) -> str:
    """What docs/results.md says of one machine."""
    machine = results.machine
    parts = [
        f"## {machine['device']}",
        f"{machine['threads']} threads, torch {machine['torch']}, {age(machine)}. Medians, in brackets over the "
        f"fastest of ours; every row with its spread, memory and share of the limits is in "
        f"`benchmarks/results/{name}/bench.csv`.",
        f"![Medians and spread of every implementation](results/{name}.png)",
        ways(results, "model"),
        ways(results, "block"),
        against_best(results, tuple(dict.fromkeys(r.bench for r in results.rows if r.bench not in _WHOLE))),
        where(FOLDER / name / "where.json"),
    ]
    return "\n\n".join(part for part in parts if part)


def quick_table(everything: Iterable[Results]) -> str:
    """README's table: each model on one image of its native size, next to timm and the best peer, int8 next to int8."""
    lines = []
    for results in everything:
        for (_, shape, dtype, mode, _), rows in _groups(results, ("model",)).items():
            if " batch 1, 448 px" not in shape:
                continue
            for precision in (dtype, "float32", "int8"):
                ours = _best((row for row in rows if _precision(row) == precision), True)
                if ours is None:
                    continue
                # Beside our bfloat16 stands a peer's float32 too: it may be the fastest there.
                beside = {precision, "float32"} if precision == dtype else {precision}
                same = [row for row in rows if _precision(row) in beside]
                peer = _best(same, False)
                timm = _best((row for row in same if row.variant.partition(" ")[0] == "timm"), False)
                work = f"{shape}, {precision}, {mode}"
                best = f"{peer.variant}: {_beside(peer, ours)}" if peer else ""
                lines.append([results.machine["device"], work, _time(ours), _beside(timm, ours) if timm else "", best])
    return markdown(["machine", "model", "internvit", "timm", "best peer"], lines)


def _precision(row: Row) -> str:
    """What a variant computes in: its work's dtype, or what its name says."""
    return next((name for name in ("int8", "float32") if name in row.variant), row.dtype)


def _time(row: Row) -> str:
    error = "" if row.error is None else f", error {100 * row.error:.2g} %"
    return f"{ms(row.p50_ms)} ms{error}"


def _beside(peer: Row, ours: Row) -> str:
    return f"{_time(peer)}, {(peer.p50_ms or 0.0) / (ours.p50_ms or 1.0):.2f} ×"


def pages() -> dict[Path, str]:
    """The files that are written from the results."""
    everything = all_results()
    readme = ROOT / "README.md"
    ages = [f"{results.machine['device']}: {age(results.machine)}" for results in everything.values()]
    below = f"Medians; {'. '.join(ages)}. [Other batches and sizes, blocks, ops](docs/results.md)."
    table = f"{quick_table(everything.values())}\n\n{below}"
    parts = [_HEAD, *(summary(name, results) for name, results in everything.items())]
    return {
        readme: replace_section(readme.read_text(), "README.md", BEGIN, END, table),
        ROOT / "docs" / "results.md": "\n\n".join(parts) + "\n",
    }


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
