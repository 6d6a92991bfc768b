"""Everything a GPU can say about this library, in one go: `make gpu-report`.

    python -m internvit.benchmarks.reports.gpu_report [--minutes 8.5] [--out FOLDER] [--only attention,block]

Kernels are compiled ahead on all cores; whole models run against the reference; then come the `gpu` tests, the tuning
file, and times of attention, its neighbours, blocks and models, with that file, next to what peers are there. All of it
lies in benchmarks/results/DEVICE/ and, after each stage, in one report.tar there. A stage is a process with a limit of
its own and keeps what it has when it is stopped. A second run goes on where the first one ended: stages that were ok
are not run again, and benchmarks go on after the last row. From a plain checkout: torch and Triton (and pytest, for the
tests), no network.

Without a GPU it says so and exits 0 having done nothing. --rehearse needs none: it counts what each stage would do on
--target, predicts its time from the seconds in `STAGES`, fails if one would not fit, and runs every stage's command in
its small form, with Triton kernels compiled and not run.
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internvit.benchmarks.harness import results as files
from internvit.benchmarks.reports import gpu_bench, gpu_smoke
from internvit.files import atomic_write
from internvit.kernels.common.target import TARGETS

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.5
"""A borrowed machine may end a command after ten minutes; starting and copying take the rest."""
CORES = 16
"""Of the machine that times are predicted for."""
GPU_TESTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_gpu*.py"))
"""By name: collecting every file would ask for the packages that only some tests need."""


@dataclass(frozen=True)
class Run:
    """What a stage's command is made from; `seconds` is its limit."""

    folder: Path
    target: str
    only: str
    rehearsed: bool
    triton_tutorial: Path | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        share: of the minutes, its limit.
        command: what runs, in its small form where the report is rehearsed.
        counting: prints how many units there are on a GPU, the first number of its last line; None where `units` knows.
        units: how many there are, where no process has to be asked.
        each: seconds a unit takes on an H100 with 16 cores, an unmeasured estimate.
        start: seconds before the first.
    """

    name: str
    share: float
    command: Callable[[Run], list[str]]
    each: float
    start: float
    counting: Callable[[Run], list[str]] | None = None
    units: Callable[[], int] = lambda: 0

    def count(self, run: Run) -> int:
        if self.counting is None:
            return self.units()
        done = subprocess.run(_python(self.counting(run)), cwd=ROOT, capture_output=True, text=True, check=False)
        number = re.search(r"\d+", (done.stdout.strip().splitlines() or [""])[-1])
        if done.returncode or number is None:
            raise RuntimeError(f"{self.name}: its work could not be counted: {(done.stderr or done.stdout)[-2000:]}")
        return int(number[0])


def _python(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", *arguments]


def _compile(run: Run) -> list[str]:
    small = ["--target", run.target, "--first", "2", "--jobs", "1"] if run.rehearsed else []
    kernels = ["models"] if run.rehearsed else ["models", "tuning"]
    return ["internvit.kernels.tools.compile_ahead", "--kernels", *kernels, *small]


def _count_kernels(*kernels: str) -> Callable[[Run], list[str]]:
    count = ["internvit.kernels.tools.compile_ahead", "--count", "--kernels", *kernels]
    return lambda run: [*count, "--target", run.target]


def _smoke(run: Run) -> list[str]:
    return ["internvit.benchmarks.reports.gpu_smoke", "--device", "cpu" if run.rehearsed else "cuda"]


def _tests(run: Run) -> list[str]:
    return ["pytest", "-q", "-m", "gpu", *(["--collect-only"] if run.rehearsed else []), *GPU_TESTS]


def _tune(run: Run) -> list[str]:
    small = ["--rehearse", run.target, "--only", "attention_delta,qk_norm_attention"] if run.rehearsed else []
    return ["internvit.kernels.tools.tune", "--pruned", "--out", str(run.folder / "tune.json"), *small]


def _bench(run: Run) -> list[str]:
    only = run.only or ("layer_scale_residual_norm" if run.rehearsed else "")
    device = "cpu" if run.rehearsed else "cuda"
    limit = f"{max(run.seconds - 10, 1):.0f}"  # it stops between two cases
    return [
        *("internvit.benchmarks.reports.gpu_bench", "--out", str(run.folder), "--device", device),
        *("--seconds", limit, "--only", only),
        *(["--triton-tutorial", str(run.triton_tutorial)] if run.triton_tutorial else []),
    ]


STAGES = (
    Stage("compile", 0.15, _compile, 2.5 / CORES, 20.0, _count_kernels("models", "tuning")),
    Stage("smoke", 0.1, _smoke, 4.0, 10.0, units=lambda: 4 * len(gpu_smoke.MODELS)),
    Stage("tests", 0.2, _tests, 0.6, 10.0, lambda run: ["pytest", "-q", "--collect-only", "-m", "gpu", *GPU_TESTS]),
    Stage("tune", 0.15, _tune, 0.4, 20.0, _count_kernels("tuning")),
    Stage(
        "bench",
        0.4,
        _bench,
        0.7,
        20.0,
        lambda run: ["internvit.benchmarks.reports.gpu_bench", "--count", "--only", run.only],
    ),
)
"""In order; shares add up to one. The benchmarks of `gpu_bench.WORTH` have to fit; others take what time is left."""
MUST_END = ("smoke", "tests")
"""Stages that are of no use half done."""


def run_stage(stage: Stage, run: Run) -> dict[str, Any]:
    """Runs a stage with its output in NAME.log; what became of it."""
    begin, log = time.monotonic(), run.folder / f"{stage.name}.log"
    with log.open("w") as file:
        try:
            command = _python(stage.command(run))
            environment = {**os.environ, "XDG_CACHE_HOME": str(run.folder / "cache")}  # tuned configurations lie there
            done = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=run.seconds
            )
            code = done.returncode
            outcome = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {run.seconds:.0f} s"
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    if "No module named pytest" in lines[-1]:
        outcome = "pytest is not installed"
    print(f"{stage.name}: {outcome}: {lines[-1]}", flush=True)
    seconds = round(time.monotonic() - begin, 1)
    return {"stage": stage.name, "outcome": outcome, "seconds": seconds, "last line": lines[-1]}


def use_tuned(folder: Path) -> None:
    """Puts what was tuned where the stages after it read it."""
    tuned = folder / "tune.json"
    if tuned.is_file():
        place = folder / "cache/internvit" / f"{json.loads(tuned.read_text())['target']}.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(tuned, place)


def write_report(folder: Path, steps: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """report.json, and everything in the folder as report.tar; both replaced in one step."""
    with atomic_write(folder / "report.json") as draft:
        draft.write_text(json.dumps({**about, "stages": list(steps.values())}, indent=1) + "\n")
    with atomic_write(folder / "report.tar") as draft, tarfile.open(draft, "w") as tar:
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix != ".tar" and path != draft:
                tar.add(path, path.name)


def earlier(folder: Path, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The stages that a run on the same device and code left in `folder`, by name."""
    try:
        report = json.loads((folder / "report.json").read_text())
        same = all(report[name] == value for name, value in about.items())
        return {stage["stage"]: stage for stage in report["stages"]} if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def predict(stages: list[Stage], run: Run, minutes: float) -> list[str]:
    """Prints what each stage would do on a GPU and the time that it would take; what does not fit."""
    over = []
    for stage in stages:
        count, limit = stage.count(run), 60 * minutes * stage.share
        seconds = stage.start + count * stage.each
        print(f"{stage.name}: {count} x {stage.each:.2f} s + {stage.start:.0f} s = {seconds:.0f} s of {limit:.0f} s")
        if seconds > limit:
            over.append(f"{stage.name} would take {seconds:.0f} s of {limit:.0f} s")
    return over


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m internvit.benchmarks.reports.gpu_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together")
    parser.add_argument("--out", type=Path, help="benchmarks/results/DEVICE by default")
    parser.add_argument("--stages", default=",".join(names), help="comma-separated; all by default")
    parser.add_argument("--only", default="", metavar="BENCHES", help=f"of {', '.join(gpu_bench.ORDER)}")
    parser.add_argument("--again", action="store_true", help="run stages that were ok before too")
    parser.add_argument("--rehearse", action="store_true", help="count and run small forms, without a GPU")
    parser.add_argument(
        "--triton-tutorial",
        type=Path,
        metavar="FILE",
        help="a copy of its 06-fused-attention.py, timed beside attention",
    )
    parser.add_argument("--target", default="sm_90", choices=tuple(TARGETS), help="what a rehearsal compiles for")
    asked = parser.parse_args(arguments)
    asked.stages = tuple(filter(None, asked.stages.split(",")))
    unknown = [name for name in asked.stages if name not in names]
    if unknown:
        parser.error(f"--stages: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    unknown = [name for name in asked.only.split(",") if name and name not in gpu_bench.ORDER]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(gpu_bench.ORDER)}, got {', '.join(unknown)}")
    if asked.triton_tutorial is not None:
        asked.triton_tutorial = asked.triton_tutorial.resolve()
        if not asked.triton_tutorial.is_file():
            parser.error(f"--triton-tutorial: {asked.triton_tutorial} is no file")
    if not asked.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {asked.minutes}")
    return asked


def main(arguments: list[str] | None = None) -> int:
    asked = parse(arguments)
    if not asked.rehearse and not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    begin, device = time.monotonic(), "cpu" if asked.rehearse else "cuda"
    folder = (asked.out or files.FOLDER / files.folder_name(device)).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    machine = files.machine(device)
    about = {name: machine[name] for name in ("device", "torch", "sources")} | {"rehearsed": asked.rehearse}
    print(f"{machine['device']}: {folder}", flush=True)
    run = Run(folder, asked.target, asked.only, asked.rehearse, asked.triton_tutorial)
    stages = [stage for stage in STAGES if stage.name in asked.stages]
    over = predict(stages, run, asked.minutes) if asked.rehearse else []
    steps = {} if asked.again else earlier(folder, about)
    for stage in stages:
        # The benchmarks resume by themselves, row by row, and may be asked for others.
        if stage.name != "bench" and steps.get(stage.name, {}).get("outcome") == "ok":
            print(f"{stage.name}: ok before", flush=True)
            continue
        left = 60 * asked.minutes - (0.0 if asked.rehearse else time.monotonic() - begin)
        # What earlier stages did not use is the last one's.
        limit = left if stage is stages[-1] else min(left, 60 * asked.minutes * stage.share)
        if asked.rehearse:  # the machine that times are predicted for has more cores
            limit *= max(1.0, CORES / (os.cpu_count() or 1))
        if limit < 1:
            steps[stage.name] = {"stage": stage.name, "outcome": "no time was left"}
        else:
            steps[stage.name] = run_stage(stage, dataclasses.replace(run, seconds=limit))
            use_tuned(folder)
        write_report(folder, steps, about)
    for line in over:
        print(f"does not fit: {line}")
    print(f"{folder / 'report.tar'}: {os.path.getsize(folder / 'report.tar') / 1e6:.1f} MB")
    wrong = [
        step
        for step in steps.values()
        if step["outcome"].startswith("exit status")
        or (step["stage"] in MUST_END and step["outcome"].startswith(("stopped", "no time")))
    ]
    return 1 if wrong or over else 0


if __name__ == "__main__":
    sys.exit(main())
