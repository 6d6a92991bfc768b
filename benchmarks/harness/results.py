"""Rows of results, the files they are kept in, and what got slower between two of them."""

import csv
import dataclasses
import datetime
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import internvit
from internvit.cli.environment import cpu_name, info
from internvit.files import atomic_write

FOLDER = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """One implementation of one case.

    Attributes:
        launch: "eager" or "CUDA graph".
        p20_ms, p50_ms, p80_ms: quantiles over the rounds; None where nothing was timed.
        speedup: the median over that of the fastest of ours: how many times ours is faster.
        peak_mib: memory held at the peak of a call over what was held before.
        share: of the machine's measured limit that the median reaches, 1 the limit itself.
        limit: which limit, "copy" or "gemm".
        error: the result's relative error to float32, where the case measures it.
        note: why nothing was timed: a missing peer, or what a result breaks of the numerics contract.
    """

    bench: str
    shape: str
    dtype: str
    mode: str
    launch: str
    variant: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int = 0
    speedup: float | None = None
    peak_mib: float | None = None
    share: float | None = None
    limit: str = ""
    note: str = ""
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    error: float | None = None

    @property
    def work(self) -> tuple[str, ...]:
        return (self.bench, self.shape, self.dtype, self.mode, self.launch)

    @property
    def times(self) -> tuple[float, float, float] | None:
        """p20, p50 and p80 in milliseconds."""
        if self.p20_ms is None or self.p50_ms is None or self.p80_ms is None:
            return None
        return self.p20_ms, self.p50_ms, self.p80_ms

    @property
    def key(self) -> tuple[str, ...]:
        return (*self.work, self.variant)


@dataclass(frozen=True)
class Results:
    """Everything one run measured, and on what."""

    machine: dict[str, Any]
    rows: tuple[Row, ...]
    limits: dict[str, Any]
    call_us: dict[str, float]
    complete: bool = True

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The rows as bench.csv and all else as bench.json in `folder`, each replaced in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        with io.StringIO(newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**dataclasses.asdict(row), "sizes": json.dumps(row.sizes)} for row in self.rows)
            _replace(folder / "bench.csv", file.getvalue())
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"rows": len(self.rows)}
        _replace(folder / "bench.json", json.dumps(facts, indent=1, sort_keys=True) + "\n")
        return folder / "bench.json", folder / "bench.csv"


def read(path: str | Path) -> Results:
    """Results from the folder of a bench.json and its bench.csv, or from either file.

    Raises:
        ValueError: a file holds something else, or the two are not of one run.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    try:
        facts = json.loads((folder / "bench.json").read_text())
        with open(folder / "bench.csv", newline="") as file:
            rows = tuple(_row(fields) for fields in csv.DictReader(file))
        if len(rows) != facts["rows"]:
            raise ValueError(f"bench.csv has {len(rows)} rows, bench.json counts {facts['rows']}")
        return Results(**{**facts, "rows": rows})
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: expected the files that `internvit bench --out` writes, got {error!r}") from error


def _row(fields: dict[str, str]) -> Row:
    """A row of bench.csv, its numbers as numbers."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Row):
        text = fields.get(field.name, "")  # results of before a column was there have none
        if field.name == "sizes":
            values[field.name] = json.loads(text)
        elif field.name == "rounds":
            values[field.name] = int(text)
        elif "float" in str(field.type):
            values[field.name] = float(text) if text else None
        else:
            values[field.name] = text
    return Row(**values)


def _replace(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text)


def _git_hash() -> str:
    root = Path(__file__).resolve().parents[2]
    try:
        call = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def _sources() -> str:
    """A digest of this package's code, compiled libraries too: what it measured stands for no other code."""
    package = Path(internvit.__file__).resolve().parent
    folders = sorted({package, *((package / name).resolve() for name in ("kernels", "benchmarks"))})
    digest = hashlib.sha256()
    for path in sorted(p for folder in folders for ext in ("*.py", "*.so") for p in folder.rglob(ext)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_TIMED = {
    "csrc": ("csrc",),
    "kernels": ("kernels",),
    "ops": ("internvit/ops",),
    "model": ("internvit/model", "internvit/inference", "internvit/upstream"),
}
"""The parts of the code that times depend on, and their folders."""
_CODE = (".py", ".h", ".cpp", ".cu")


def code() -> dict[str, str]:
    """A digest of the sources of each part that times depend on; any change of a file counts."""
    root = Path(__file__).resolve().parents[2]
    found = {}
    for part, folders in _TIMED.items():
        digest = hashlib.sha256()
        files = [path for folder in folders for path in (root / folder).rglob("*") if path.suffix in _CODE]
        for path in sorted(files):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
        found[part] = digest.hexdigest()[:16]
    return found


def changed_since(machine: Mapping[str, Any]) -> list[str]:
    """The parts of the code that are not what was timed there; all of them where it was not recorded."""
    recorded = machine.get("code", {})
    return [part for part, digest in code().items() if recorded.get(part) != digest]


def age(machine: Mapping[str, Any]) -> str:
    """When something was timed, and which parts of the code are others since."""
    changed = changed_since(machine)
    note = f"; the code has changed since in {', '.join(changed)}" if changed else ""
    return f"{machine['time'][:10]}{note}"


def device_name(device: str) -> str:
    """The device as people name it."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    best_first = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
    sets = [s for s in best_first if s in info()["cpu"]["instruction sets"]]
    return f"{cpu_name()}, {os.cpu_count()} cores{', ' + sets[0].replace('_', ' ').upper() if sets else ''}"


def folder_name(device: str) -> str:
    """The same as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def machine(device: str) -> dict[str, Any]:
    """Which machine, versions, commit and command."""
    program = Path(sys.argv[0])
    command = [program.parent.name if program.stem == "__main__" else program.stem]
    command += [re.sub(r"(^|=)/.*/", r"\1", word) for word in sys.argv[1:]]  # results are published: no folder of mine
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "torch": torch.__version__,
        "versions": info()["versions"],
        "instruction sets": info()["cpu"]["instruction sets"],
        "git": _git_hash(),
        "sources": _sources(),
        "code": code(),
        "command": " ".join(command),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


@dataclass(frozen=True)
class Change:
    """How one row differs between two runs."""

    key: tuple[str, ...]
    old_ms: float
    new_ms: float
    verdict: str

    @property
    def ratio(self) -> float:
        return self.new_ms / self.old_ms


def compare(old: Results, new: Results) -> list[Change]:
    """Rows that both have; "slower" where the new p20 lies above the old p80, "faster" the other way round."""
    before = {row.key: row for row in old.rows}
    changes = []
    for row in new.rows:
        was = before.get(row.key)
        old_times, new_times = (None if r is None else r.times for r in (was, row))
        if old_times is None or new_times is None:
            continue
        verdict = "within the spread"
        if new_times[0] > old_times[2]:
            verdict = "slower"
        elif new_times[2] < old_times[0]:
            verdict = "faster"
        changes.append(Change(row.key, old_times[1], new_times[1], verdict))
    return sorted(changes, key=lambda c: -c.ratio)


def with_speedups(rows: Iterable[Row]) -> list[Row]:
    """The same rows, each with its median over that of the fastest of ours for the same work, in the work's dtype."""
    rows = list(rows)
    best: dict[tuple[str, ...], float] = {}
    for row in rows:
        if (
            row.variant.startswith("internvit")
            and not row.variant.endswith(("int8", "float32"))
            and row.p50_ms is not None
        ):
            best[row.work] = min(row.p50_ms, best.get(row.work, row.p50_ms))
    return [
        dataclasses.replace(row, speedup=round(row.p50_ms / best[row.work], 3))
        if row.p50_ms is not None and row.work in best
        else row
        for row in rows
    ]


if __name__ == "__main__":
    print(folder_name("cuda" if torch.cuda.is_available() else "cpu"))
