"""Everything a GPU can say about this library, in one go: `make gpu-report`.

    python -m internvit.benchmarks.reports.gpu_report [--device cuda|cpu] [--minutes 10] [--out FOLDER]

The `gpu` tests, the tuning file, then every op, block and model, eager and as CUDA graphs, next to what peers are
installed; all of it under benchmarks/results/DEVICE/. From a plain checkout: torch and Triton, no compiler, no
network, nothing to install. Without a GPU it says so and exits 0 having done nothing; `--device cpu` rehearses it at
small sizes.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from internvit.benchmarks.harness import results as files
from internvit.benchmarks.harness.cases import Setting
from internvit.benchmarks.harness.run import BENCHES, run
from internvit.benchmarks.reports.table import plain

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("model",)


def step(name: str, command: list[str], folder: Path, limit: float) -> dict[str, object]:
    """Runs one command with its output in `folder`/NAME.log; what became of it."""
    begin = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("w") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit).returncode
            outcome = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:.0f} s"
        except OSError as error:
            outcome = str(error)
    last = (log.read_text().strip().splitlines() or [""])[-1]
    print(f"{name}: {outcome}: {last}", flush=True)
    return {"step": name, "outcome": outcome, "seconds": round(time.monotonic() - begin, 1), "last line": last}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m internvit.benchmarks.reports.gpu_report", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses it at small sizes")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop starting new steps after so long")
    parser.add_argument("--out", type=Path, help="benchmarks/results/DEVICE by default")
    asked = parser.parse_args(arguments)
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    end = time.monotonic() + 60 * asked.minutes
    rehearsal = asked.device == "cpu"
    folder = asked.out or files.FOLDER / files.folder_name(asked.device)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{files.device_name(asked.device)}: {folder}", flush=True)
    steps = []
    # By name: collecting every file would ask for the packages that only some tests need.
    files_of_gpu_tests = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests").rglob("test_gpu*.py"))]
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files_of_gpu_tests]
    if rehearsal:
        tests.append("--collect-only")
        tune = [sys.executable, "-m", "internvit.kernels.tools.tune", "--help"]
    else:
        tune = [sys.executable, "-m", "internvit.kernels.tools.tune", "--out", str(folder / "tune.json")]
    steps.append(step("tests", tests, folder, 0.35 * 60 * asked.minutes))
    steps.append(step("tune", tune, folder, 0.15 * 60 * asked.minutes))
    setting = Setting(asked.device, quick=rehearsal)

    def progress(text: str) -> None:
        print(f"  {end - time.monotonic():4.0f} s left: {text}", flush=True)
        if time.monotonic() > end:
            raise KeyboardInterrupt  # what was measured is kept, as after Ctrl-C

    benches = tuple(b for b in BENCHES if b not in (*MODELS, "patch"))
    found = run((*MODELS, *benches), setting, rounds=3 if rehearsal else 7, folder=folder, progress=progress)
    print(plain(found))
    steps.append({"step": "bench", "outcome": "ok" if found.complete else f"stopped after {asked.minutes} minutes"})
    try:
        from internvit.benchmarks.reports.plots import draw

        draw(found, folder)
    except ImportError as error:
        steps.append({"step": "plots", "outcome": f"{error.name} is not installed"})
    refused = [row for row in found.rows if row.note.startswith("refused")]
    steps.append({"step": "numerics", "outcome": f"{len(refused)} results refused"})
    (folder / "report.json").write_text(json.dumps({"machine": found.machine, "steps": steps}, indent=1) + "\n")
    failed = [s for s in steps if s["step"] == "tests" and s["outcome"] != "ok"]
    return 1 if refused or failed else 0


if __name__ == "__main__":
    sys.exit(main())
