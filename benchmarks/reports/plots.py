"""Pictures of results: bars against peers, a roofline, and time over tokens and batch."""

from pathlib import Path
from typing import Any

from internvit.benchmarks.harness.results import Results, Row
from internvit.benchmarks.reports.table import grouped, heading, ms
from internvit.files import atomic_write

OURS, THEIRS = "#1f6f8b", "#c9c2b8"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _is_ours(row: Row) -> bool:
    return row.variant.startswith("internvit")


def _save(plt: Any, figure: Any, path: Path) -> Path:
    with atomic_write(path) as part:
        figure.savefig(part, dpi=150, format="png", metadata={"Software": None})
    plt.close(figure)
    return path


def bars(results: Results, bench: str, path: Path, mode: str = "forward") -> Path | None:
    """One panel a piece of work of `bench`: medians with p20 and p80, ours in colour."""
    groups = [
        [row for row in rows if row.p50_ms is not None]
        for work, rows in grouped(results.rows).items()
        if work[0] == bench and work[3] == mode
    ]
    groups = [rows for rows in groups if rows]
    if not groups:
        return None
    plt = _pyplot()
    heights = [0.42 * len(rows) + 0.5 for rows in groups]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(8, sum(heights) + 0.4),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis, rows in zip(axes[:, 0], groups, strict=True):
        for i, row in enumerate(reversed(rows)):
            low, high = row.p20_ms or row.p50_ms, row.p80_ms or row.p50_ms
            spread = [[row.p50_ms - low], [high - row.p50_ms]]  # type: ignore[operator]
            axis.barh(i, row.p50_ms, color=OURS if _is_ours(row) else THEIRS, xerr=spread, error_kw={"lw": 0.8})
            factor = "" if row.speedup is None or row.speedup == 1 else f"  {row.speedup:.2f} x ours"
            axis.text(high, i, f"  {ms(row.p50_ms)} ms{factor}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row.variant for row in reversed(rows)], fontsize=8)
        axis.set_xlim(0, 1.35 * max(row.p80_ms or row.p50_ms or 0 for row in rows))
        axis.set_title(heading(rows[0].work), fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=8)
    axes[-1, 0].set_xlabel(
        f"milliseconds, {results.machine['device']}, {results.machine['threads']} threads", fontsize=8
    )
    return _save(plt, figure, path)


def shares(results: Results, path: Path) -> Path | None:
    """How much of the machine's measured limit each op reaches, forward, ours and the best peer."""
    lines: list[tuple[str, float, float | None]] = []
    for work, rows in grouped(results.rows).items():
        timed = [row for row in rows if row.share is not None]
        ours = [row.share or 0.0 for row in timed if _is_ours(row)]
        peers = [row.share or 0.0 for row in timed if not _is_ours(row)]
        if work[3] == "forward" and work[4] == "eager" and ours:
            lines.append((f"{work[0]} {work[1]} {work[2]}", max(ours), max(peers, default=None)))
    if not lines:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 0.27 * len(lines) + 1), layout="constrained")
    for i, (_, best, peer) in enumerate(reversed(lines)):
        axis.plot([0, 100 * best], [i, i], color=OURS, lw=1)
        axis.plot(100 * best, i, "o", color=OURS, label="ours" if i == 0 else None)
        if peer is not None:
            axis.plot(100 * peer, i, "o", color=THEIRS, mec="grey", label="best peer" if i == 0 else None)
    axis.axvline(100, color="black", lw=0.8)
    axis.set_yticks(range(len(lines)), [name for name, *_ in reversed(lines)], fontsize=7)
    axis.set_xlabel(f"% of the measured copy bandwidth or GEMM rate, {results.machine['device']}", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, loc="lower right")
    return _save(plt, figure, path)


def roofline(results: Results, path: Path) -> Path | None:
    """Reached flops a second over flops a byte, under the measured bandwidth and GEMM rate."""
    points = [
        r for r in results.rows if r.p50_ms and r.sizes.get("flops") and r.sizes.get("bytes") and r.mode == "forward"
    ]
    points = [r for r in points if r.dtype in results.limits["gemm"]]
    if not points:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    bandwidth = results.limits["bandwidth"]
    low, high = 0.5, 2 * max(r.sizes["flops"] / r.sizes["bytes"] for r in points)
    for name, peak in results.limits["gemm"].items():
        ridge = peak / bandwidth
        axis.loglog([low, ridge, max(high, 2 * ridge)], [low * bandwidth, peak, peak], lw=1, color="black")
        axis.text(max(high, 2 * ridge), peak, f" {name} GEMM", fontsize=7, va="center")
    for r in points:
        x, y = r.sizes["flops"] / r.sizes["bytes"], r.sizes["flops"] / (r.p50_ms * 1e-3)  # type: ignore[operator]
        axis.loglog(x, y, "o", ms=4, color=OURS if _is_ours(r) else THEIRS, mec="grey", mew=0.3)
        if _is_ours(r):
            axis.annotate(
                f"{r.bench} {r.dtype[0]}{r.dtype[-2:]}", (x, y), fontsize=6, xytext=(3, 2), textcoords="offset points"
            )
    axis.set_xlabel("flops a byte that must move", fontsize=8)
    axis.set_ylabel("flops a second", fontsize=8)
    axis.set_title(f"{results.machine['device']}: ours in colour, peers grey", fontsize=9, loc="left")
    return _save(plt, figure, path)


def over(results: Results, what: str, path: Path) -> Path | None:
    """Time of the model per image and layer over `what`, "tokens" or "batch", the other sizes held."""
    other = "batch" if what == "tokens" else "tokens"
    rows = [r for r in results.rows if r.bench == "model" and r.p50_ms is not None and r.sizes]
    held = {r.sizes[other] for r in rows}
    best = max(held, key=lambda value: len({r.sizes[what] for r in rows if r.sizes[other] == value}), default=None)
    rows = [r for r in rows if r.sizes[other] == best]
    if len({r.sizes[what] for r in rows}) < 2:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    for variant in dict.fromkeys(r.variant for r in rows):
        line = sorted(
            (r.sizes[what], r.p50_ms / r.sizes["layers"] / r.sizes["batch"])  # type: ignore[operator]
            for r in rows
            if r.variant == variant and r.launch == "eager"
        )
        ours = variant.startswith("internvit")
        axis.plot(*zip(*line, strict=True), "o-", lw=2 if ours else 1, label=variant)
    axis.set_xlabel(what, fontsize=9)
    axis.set_ylabel("ms an image and layer", fontsize=9)
    axis.set_title(f"InternViT, {results.machine['device']}, {other} {best}", fontsize=9, loc="left")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return _save(plt, figure, path)


def draw(results: Results, folder: Path) -> list[Path]:
    """Every picture that these results can fill."""
    made = [bars(results, bench, folder / f"{bench}.png") for bench in dict.fromkeys(r.bench for r in results.rows)]
    made += [shares(results, folder / "shares.png"), roofline(results, folder / "roofline.png")]
    made += [over(results, what, folder / f"{what}.png") for what in ("tokens", "batch")]
    return [path for path in made if path is not None]
