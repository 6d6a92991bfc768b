"""Measures launch choices on the GPU at hand and writes the best to a file that the package reads.

    python -m internvit.kernels.tools.tune --out ~/.cache/internvit/sm_90.json [--only attention] [--dtype bfloat16]

Unmeasured: no GPU has run this yet. Each candidate runs on InternViT's shapes with cold L2 (a buffer larger than it is
written between runs); candidates are interleaved and compared by their medians. A choice is kept only where it beats
the analytic rule by 2 %, and only if its results equal the rule's to the last bits of the contract.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from internvit.files import atomic_write
from internvit.kernels.attention import backward as attention_backward
from internvit.kernels.attention import forward as attention
from internvit.kernels.attention.config import AttentionLaunch, attention_launch
from internvit.kernels.common import rows
from internvit.kernels.common.launch import Target, target_of, tuned_files
from internvit.kernels.common.rows import RowLaunch, row_launch
from internvit.ops.backends.registry import implementation

ROUNDS = 20
DEVICE = "cuda"
BATCH, TOKENS = 8, 1025
MODELS = ((25, 128), (16, 64))


def row_candidates() -> Iterator[RowLaunch]:
    return itertools.starmap(RowLaunch, itertools.product((1, 2, 4, 8), (2, 4, 8, 16)))


def attention_candidates() -> Iterator[AttentionLaunch]:
    choices = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3, 4))
    return itertools.starmap(AttentionLaunch, choices)


def _random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def row_problems(channels: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """launch name -> a call whose only kernel is of that name."""
    x, w = _random(BATCH, TOKENS, channels, dtype=dtype), _random(channels, dtype=dtype)
    stat, scale = _random(BATCH, TOKENS, dtype=torch.float32), _random(BATCH, dtype=torch.float32)
    calls: dict[str, tuple] = {
        "rms_norm": (x, w, 1e-6, "fused"),
        "rms_norm_backward": (x, x, w, stat, (True, True)),
        "layer_norm": (x, w, w, 1e-6),
        "layer_norm_backward": (x, x, w, stat, stat, (True,) * 3),
        "layer_scale_residual": (x, x, w, scale),
        "layer_scale_residual_backward": (x, x, w, scale, dtype, (True, True)),
        "layer_scale_residual_norm": (x, x, w, scale, w, None, 1e-6, "rms_norm", "fused"),
        "layer_scale_residual_norm_backward": (
            *(x, x, x, x, w, scale, w, stat, stat, "rms_norm"),
            (True, True, True, True, False),
        ),
    }
    return {op: lambda op=op, args=args: implementation(op, "triton")(*args) for op, args in calls.items()}  # type: ignore[misc]


def attention_problems(heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    q, k, v = _random(BATCH, TOKENS, 3, heads, head_dim, dtype=dtype).unbind(2)
    grads = _random(BATCH, TOKENS, 3, heads, head_dim, dtype=dtype).unbind(2)
    scale = head_dim**-0.5
    out, lse = attention.attention(q, k, v, scale, None, None, None, None)

    def backward() -> Any:
        return attention_backward.attention_backward(
            out, q, k, v, out, lse, scale, None, None, None, None, *grads
        ) and tuple(g.clone() for g in grads)

    return {
        "forward": lambda: attention.attention(q, k, v, scale, None, None, None, None),
        "grad_kv": backward,
        "grad_q": backward,
    }


def measure(calls: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median milliseconds of each call, interleaved, L2 cold."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
            times[key].append(start.elapsed_time(end))
    return {key: statistics.median(samples) for key, samples in times.items()}


def best(problem: Callable[[], Any], candidates: Iterator[Any], rule: Any, use: Callable[[Any], Any]) -> Any:
    """The fastest candidate that agrees with the rule's result; the rule itself unless beaten by 2 %."""

    def call(choice: Any) -> Callable[[], Any]:
        def run() -> Any:
            with use(choice):
                return problem()

        return run

    def flat(result: Any) -> list[torch.Tensor]:
        return [t for t in (result if isinstance(result, tuple) else (result,)) if t.numel()]

    expected, calls = flat(call(rule)()), {rule: call(rule)}
    for choice in candidates:
        try:
            result = flat(call(choice)())
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
        if all(
            torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2) for a, b in zip(result, expected, strict=True)
        ):
            calls[choice] = call(choice)
    times = measure(calls)
    fastest = min(times, key=lambda c: times[c])
    return fastest if times[fastest] < 0.98 * times[rule] else rule


def tune(target: Target, dtypes: list[torch.dtype], only: str) -> dict[str, dict[str, dict[str, int]]]:
    from unittest import mock

    choices: dict[str, dict[str, dict[str, int]]] = {}

    def keep(kernel: str, key: str, choice: Any, rule: Any) -> None:
        print(f"{target.name} {kernel} {key}: {choice}{'' if choice != rule else ' (the rule)'}", flush=True)
        if choice != rule:
            choices.setdefault(kernel, {})[key] = asdict(choice)

    for heads, head_dim in MODELS:
        for dtype in dtypes:
            for kernel, problem in attention_problems(heads, head_dim, dtype).items():
                if only in f"attention_{kernel}":
                    rule = AttentionLaunch.rule(kernel, head_dim, dtype.itemsize, target)

                    def use(choice: Any, kernel: str = kernel) -> Any:
                        def chosen(asked: str, *rest: Any) -> AttentionLaunch:
                            return choice if asked == kernel else attention_launch(asked, *rest)

                        module = attention if kernel == "forward" else attention_backward
                        return mock.patch.object(module, "attention_launch", chosen)

                    found = best(problem, attention_candidates(), rule, use)
                    keep(f"attention_{kernel}", f"D={head_dim},bytes={dtype.itemsize}", found, rule)
        channels = heads * head_dim
        for op, problem in row_problems(channels, dtypes[0]).items():
            if only in op:

                def use_rows(choice: Any, op: str = op) -> Any:
                    def measured(*_: Any) -> RowLaunch:
                        return choice

                    row_launch.cache_clear()
                    return mock.patch.object(rows.launch, "choose", measured)

                row_rule = RowLaunch.rule(channels)
                keep(op, f"C={channels}", best(problem, row_candidates(), row_rule, use_rows), row_rule)
                row_launch.cache_clear()
    return choices


def write(path: Path, choices: dict[str, Any], **about: str) -> None:
    """Puts the file in place in one step: another process reads the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_text(json.dumps({**about, "choices": choices}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m internvit.kernels.tools.tune", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="~/.cache/internvit/TARGET.json is read at run time")
    parser.add_argument("--only", default="", help="only kernels whose name contains this")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    args.out = args.out.expanduser()
    if args.out.is_dir():
        parser.error(f"--out: expected a file, got the folder {args.out}")
    if not torch.cuda.is_available():
        parser.exit(1, "tune: no GPU is visible to torch; launch choices stay those of the analytic rules\n")
    target = target_of(torch.empty(0, device=DEVICE))
    choices = tune(target, [getattr(torch, d) for d in args.dtype], args.only)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    write(args.out, choices, target=target.name, device=torch.cuda.get_device_name(), **versions)
    if args.out not in tuned_files(target):
        print(f"tune: {args.out} is not read from where it is; put it at {tuned_files(target)[0]}")


if __name__ == "__main__":
    main()
