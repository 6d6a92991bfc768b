"""Microseconds of host time that a call of each op takes: where a GPU waits for the host, this is what it waits for.

    python -m internvit.benchmarks.reports.host_time [--only layer_norm,gelu] [--rounds 20] [--json FILE]

No GPU is needed. Inputs are a few rows, so that next to nothing is computed. `triton` is the whole path of a call up to
the driver: validation, choice of backend, allocation of outputs, and Triton's JIT, which specialises on the arguments
and looks the compiled kernel up. The kernel is compiled for --target and not started; a driver adds some microseconds.
`cpu` is the same path into the compiled library, and `raw cpu` the library's op by itself. `torch` is the op's plain
formula, for layer_norm torch's own kernel. A cell is empty where a backend has no such op. Candidates take turns; the
least of the rounds counts, in CPU time of the calling thread: what other processes do to the machine hardly shows.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools.compile_only import compile_and_look_up, intercepting, triton_takes_cpu_tensors
from internvit.ops.backends.registry import backends_for
from internvit.ops.core.registration import OPS
from internvit.ops.core.spec import SPECS, Arguments, Inputs, OpSpec, Size, as_tuple, differentiable

FORWARD, BOTH = "forward", "forward+backward"
SIZE = Size(1, 4, 2, 64)
Times = dict[tuple[str, str], float]


class _FirstCall(TorchDispatchMode):
    """The arguments of the first registered op that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.args: tuple[Any, ...] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "internvit" and self.args is None:
            self.args = args[:-1]
        return func(*args, **(kwargs or {}))


def _raw_call(spec: OpSpec, arguments: Arguments) -> Callable[[], Any] | None:
    """The CPU library's op on the arguments that the public function hands it; None where it has none of its own."""
    if "cpu" not in OPS[spec.op].compiled:
        return None
    with _FirstCall() as first, torch.no_grad():
        spec.run(arguments, "cpu")
    assert first.args is not None
    raw = getattr(torch.ops.internvit_cpu, spec.op).default
    names = (a.name for a in OPS[spec.op].overload._schema.arguments)
    named = dict(zip(names, first.args, strict=False))
    return functools.partial(raw, *(named[a.name] for a in raw._schema.arguments))


def _forward_and_backward(function: Callable[[Arguments], tuple[Tensor, ...]], arguments: Arguments) -> Callable:
    leaves = {n: t.detach().clone().requires_grad_() for n, t in differentiable(arguments).items()}
    grads = [torch.ones_like(t) for t in function({**arguments, **leaves})]
    return lambda: torch.autograd.grad(function({**arguments, **leaves}), list(leaves.values()), grads)


def _without_gradients(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function()

    return call


def candidates(spec: OpSpec, dtype: torch.dtype) -> dict[tuple[str, str], Callable[[], Any]]:
    """(candidate, mode) -> what is timed."""
    arguments = next(iter(spec.examples.values()))(Inputs(SIZE, dtype=dtype))
    available = backends_for(spec.implemented_as, "cpu", dtype, SIZE.head_dim)
    functions: dict[str, Callable[[Arguments], tuple[Tensor, ...]]] = {
        "torch": lambda given: as_tuple(spec.formula(**given)),
        **{b: functools.partial(spec.run, backend=b) for b in ("cpu", "triton") if b in available},
    }
    calls = {}
    raw = _raw_call(spec, arguments) if "cpu" in functions else None
    if raw is not None:
        calls["raw cpu", FORWARD] = _without_gradients(raw)
    for name, function in functions.items():
        calls[name, FORWARD] = _without_gradients(functools.partial(function, arguments))
        calls[name, BOTH] = _forward_and_backward(function, arguments)
    return calls


def _microseconds(call: Callable[[], Any], calls: int) -> float:
    begin = time.thread_time_ns()
    for _ in range(calls):
        call()
    return (time.thread_time_ns() - begin) / (1e3 * calls)


def measure(only: tuple[str, ...], dtype: torch.dtype, target: str, rounds: int, calls: int) -> Iterator[tuple]:
    """(op, {(candidate, mode): microseconds a call}) for each op."""
    with intercepting(TARGETS[target], compile_and_look_up), triton_takes_cpu_tensors():
        for name in only or tuple(SPECS):
            timed = candidates(SPECS[name], dtype)
            least = dict.fromkeys(timed, float("inf"))
            for call in timed.values():
                call()  # compiles
            for _ in range(rounds):
                for key, call in timed.items():
                    least[key] = min(least[key], _microseconds(call, calls))
            yield name, least


COLUMNS = ("torch", "raw cpu", "cpu", "triton")


def line(name: str, times: Times, mode: str) -> str:
    cells = (times.get((column, mode)) for column in COLUMNS)
    return f"{name:32}" + "".join(f"{'' if us is None else f'{us:.1f}':>10}" for us in cells)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvit.benchmarks.reports.host_time",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", default="", metavar="OPS", help="comma-separated; all by default")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--target", default="sm_90", choices=tuple(TARGETS), help="what Triton compiles for")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=100, help="calls in a round")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    asked = parser.parse_args(arguments)
    only = tuple(filter(None, asked.only.split(",")))
    unknown = [name for name in only if name not in SPECS]
    if unknown:
        parser.error(f"--only: expected some of {', '.join(SPECS)}, got {', '.join(unknown)}")
    if min(asked.rounds, asked.calls) < 1:
        parser.error(f"--rounds and --calls must be at least 1, got {asked.rounds} and {asked.calls}")
    torch.set_num_threads(1)
    found: dict[str, Times] = {}
    for name, times in measure(only, getattr(torch, asked.dtype), asked.target, asked.rounds, asked.calls):
        found[name] = times
        print(f"  {name}", flush=True)
    for mode in (FORWARD, BOTH):
        print(f"\n{f'us a call, {mode}':32}" + "".join(f"{column:>10}" for column in COLUMNS))
        for name, times in found.items():
            print(line(name, times, mode))
    if asked.json:
        rows = [
            {"op": name, "candidate": candidate, "mode": mode, "us": round(us, 2)}
            for name, times in found.items()
            for (candidate, mode), us in times.items()
        ]
        asked.json.write_text(json.dumps({"dtype": asked.dtype, "target": asked.target, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
