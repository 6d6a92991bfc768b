"""Medians of interleaved runs: the one way a time is taken in this folder.

Every candidate runs once in each round, in turn, so that a busy minute of the machine hits all of them alike; what is
reported is the ratio of medians, with the spread of the ratio over the rounds.
"""

import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from internvit.info import cpu_name

RESULTS = Path(__file__).parent / "results"


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each candidate in each round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + warm_up):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                times[name].append(time.perf_counter() - start)
    return times


def rows_of(case: str, times: dict[str, list[float]], ours: str) -> list[dict[str, object]]:
    """One row a candidate: median and fastest time, and how many times `ours` is faster, with its quartiles."""
    rows = []
    for name, seconds in times.items():
        ratios = sorted(t / o for t, o in zip(seconds, times[ours], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "case": case,
                "what": name,
                "median_ms": round(statistics.median(seconds) * 1e3, 3),
                "min_ms": round(min(seconds) * 1e3, 3),
                "ratio_of_medians": round(statistics.median(seconds) / statistics.median(times[ours]), 2),
                "ratio_quartiles": f"{low:.2f}-{high:.2f}",
            }
        )
    return rows


def write(name: str, rows: list[dict[str, object]], threads: int) -> None:
    """Prints the rows and writes them to results/<name>.csv with the machine's name."""
    facts = {"cpu": f"{cpu_name()}, {os.cpu_count()} cores", "threads": threads, "torch": torch.__version__}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *facts])
        writer.writeheader()
        writer.writerows({**row, **facts} for row in rows)
    for row in rows:
        print("  ".join(f"{k}={v}" for k, v in row.items()))
