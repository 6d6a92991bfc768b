"""The benchmarks of a GPU report: no float32, in order of worth, torch.compile last, resumed where they stopped.

python -m internvit.benchmarks.reports.gpu_bench --out FOLDER [--only attention,block] [--seconds 150] [--count]
"""

import argparse
import time
from pathlib import Path

import torch

from internvit.benchmarks.harness.cases import Setting
from internvit.benchmarks.harness.run import BENCHES, cases, run
from internvit.benchmarks.reports.table import plain

WORTH = ("attention", "qk_norm_attention", "layer_scale_residual_norm", "block", "model")
"""What is measured first."""
ORDER = (*WORTH, *(name for name in BENCHES if name not in (*WORTH, "patch")))


def count(benches: tuple[str, ...]) -> int:
    """The implementations that are timed on a GPU, each mode by itself, but for those that torch.compile builds."""
    setting = Setting("cuda", dtypes=(torch.bfloat16,))
    modes = [(case, mode) for case in cases(benches, setting) for mode in case.modes]
    return sum(
        not one.compiles and (mode == "forward" or one.trains) for case, mode in modes for one in case.implementations
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvit.benchmarks.reports.gpu_bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="where bench.json and bench.csv are written and resumed from")
    parser.add_argument("--only", default="", metavar="BENCHES", help=f"comma-separated; {', '.join(ORDER)}")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: small sizes")
    parser.add_argument("--count", action="store_true", help="count what is timed on a GPU and time nothing")
    parser.add_argument("--triton-tutorial", type=Path, metavar="FILE", help="its 06-fused-attention.py, as a peer")
    asked = parser.parse_args(arguments)
    only = tuple(filter(None, asked.only.split(",")))
    unknown = [name for name in only if name not in ORDER]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(ORDER)}, got {', '.join(unknown)}")
    benches = tuple(name for name in ORDER if name in only) if only else ORDER
    if asked.count:
        print(count(benches if only else WORTH))
        return 0
    if asked.out is None:
        parser.error("--out is needed")
    end = time.monotonic() + asked.seconds

    def progress(text: str) -> None:
        print(f"  {end - time.monotonic():4.0f} s left: {text}", flush=True)
        if time.monotonic() > end:
            raise KeyboardInterrupt  # what was measured is kept, as after Ctrl-C

    small = asked.device == "cpu"
    setting = Setting(asked.device, small, (torch.bfloat16,), asked.triton_tutorial)
    found = run(benches, setting, None, 3 if small else 7, asked.out, progress, compiles_last=True, resume=True)
    print(plain(found))
    refused = [row for row in found.rows if row.note.startswith("refused")]
    for row in refused:
        print(f"{row.key}: {row.note}")
    print(f"{len(found.rows)} rows, {len(refused)} refused, {'complete' if found.complete else 'stopped by the clock'}")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
