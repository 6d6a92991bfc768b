"""Times every piece of work: the contract first, then interleaved rounds. What breaks the contract is not timed."""

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from internvit.benchmarks.harness import machine_limits
from internvit.benchmarks.harness.cases import (
    BOTH,
    FORWARD,
    MissingPeerError,
    Setting,
    Variant,
    Work,
    gradients,
    leaves,
    tensors,
)
from internvit.benchmarks.harness.results import Results, Row, machine, with_speedups
from internvit.benchmarks.harness.timing import (
    Times,
    copies_past_cache,
    freed_pages_kept,
    graphed,
    interleaved,
    peak_bytes,
    rotating,
    seconds_of,
)

OPS = (
    "rms_norm",
    "layer_norm",
    "layer_scale_residual",
    "layer_scale_residual_norm",
    "qk_norm_stats",
    "qk_norm",
    "attention",
    "qk_norm_attention",
    "linear_gelu",
    "linear_layer_scale",
)
LEAST_ROUNDS, MOST_SECONDS = 5, 6.0
"""Work that takes longer than so many seconds gets no more than five rounds: its spread is small beside it."""
BENCHES = (*OPS, "block", "patch", "model")
Progress = Callable[[str], None]


def module_of(bench: str) -> Any:
    return importlib.import_module(f"internvit.benchmarks.bench_{bench}")


def works(benches: tuple[str, ...], setting: Setting) -> list[Work]:
    """The pieces of work of these benchmark files."""
    return [work for bench in benches for work in module_of(bench).works(setting)]


def checked(work: Work, variant: Variant, mode: str, function: Callable[..., Any]) -> list[str]:
    """What a variant's result, or its gradients, break of the numerics contract; `function` as built."""
    with torch.no_grad() if mode == FORWARD else nullcontext():
        inputs = work.inputs()
        if mode == FORWARD:
            failures = work.judge(function(*inputs), inputs)
        else:
            assert work.judge_gradients is not None
            inputs = leaves(inputs)
            incoming = tuple(torch.randn_like(t) for t in tensors(function(*inputs)))
            failures = work.judge_gradients(gradients(function, inputs, incoming), inputs, incoming)
    return failures


def callable_for(work: Work, mode: str, function: Callable[..., Any]) -> tuple[Callable[..., Any], list[tuple]]:
    """What is timed, and the sets of arguments it takes in turn."""
    first = work.inputs()
    sets = [first, *(work.inputs() for _ in range(copies_past_cache(first, str(tensors(first)[0].device)) - 1))]
    if mode == FORWARD:

        def forward(*inputs: Any) -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward, sets
    sets = [leaves(inputs) for inputs in sets]
    incoming = tuple(torch.randn_like(t) for t in tensors(function(*sets[0])))
    return lambda *inputs: gradients(function, inputs, incoming), sets


def run_work(
    work: Work, mode: str, setting: Setting, peers: tuple[str, ...] | None, rounds: int, limits: machine_limits.Limits
) -> Iterator[list[Row]]:
    """The rows of one piece of work, after each round."""
    common = {
        "bench": work.bench,
        "shape": work.shape,
        "dtype": work.dtype_name,
        "mode": mode,
        "sizes": {**work.sizes, "bytes": int(work.bytes.get(mode, 0)), "flops": int(work.flops.get(mode, 0))},
    }
    gaps: list[Row] = []
    ready: dict[tuple[str, str], Callable[[], object]] = {}
    calls: dict[tuple[str, str], int] = {}
    memory: dict[tuple[str, str], int | None] = {}
    for variant in work.variants:
        if mode == BOTH and not variant.trains:
            continue
        if not variant.ours and peers is not None and variant.name not in peers:
            continue
        row = Row(**common, launch="eager", variant=variant.name)  # type: ignore[arg-type]
        try:
            function = variant.build()
            failures = checked(work, variant, mode, function) if variant.ours else []
        except MissingPeerError as gap:
            gaps.append(dataclasses.replace(row, note=str(gap)))
            continue
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            gaps.append(dataclasses.replace(row, note=f"failed: {type(error).__name__}: {lines[0]}"))
            continue
        if failures:
            gaps.append(dataclasses.replace(row, note=f"refused, the result is wrong: {'; '.join(failures)}"))
            continue
        call, sets = callable_for(work, mode, function)
        ready[variant.name, "eager"] = rotating(call, sets)
        calls[variant.name, "eager"] = 1
        memory[variant.name, "eager"] = peak_bytes(ready[variant.name, "eager"], setting.device)
        if setting.device.startswith("cuda"):
            try:
                replay, count = graphed(call, sets)
            except RuntimeError as error:
                note = f"no CUDA graph: {str(error).splitlines()[0]}"
                gaps.append(dataclasses.replace(row, launch="CUDA graph", note=note))
                continue
            ready[variant.name, "CUDA graph"], calls[variant.name, "CUDA graph"] = replay, count
    least, limit = limits.seconds(work.bytes.get(mode, 0.0), work.flops.get(mode, 0.0), work.dtype_name)
    yield gaps
    labels = {f"{name}|{launch}": (name, launch) for name, launch in ready}
    candidates = {label: ready[key] for label, key in labels.items()}
    begin = time.monotonic()
    for done, times in enumerate(interleaved(candidates, rounds, device=setting.device), 1):
        timed = [
            _row(common, labels[label], found, calls[labels[label]], memory.get(labels[label]), least, limit)
            for label, found in times.items()
        ]
        yield with_speedups([*timed, *gaps])
        if done >= LEAST_ROUNDS and time.monotonic() - begin > MOST_SECONDS:
            return


def _row(
    common: dict, key: tuple[str, str], times: Times, calls: int, memory: int | None, least: float, limit: str
) -> Row:
    def ms(percent: int) -> float:
        return round(times.quantile(percent) / calls * 1e3, 5)

    return Row(
        **common,
        variant=key[0],
        launch=key[1],
        p20_ms=ms(20),
        p50_ms=ms(50),
        p80_ms=ms(80),
        rounds=len(times.seconds),
        peak_mib=None if memory is None else round(memory / 2**20, 2),
        share=round(least / (times.median / calls), 4) if least else None,
        limit=limit if least else "",
    )


def call_costs(setting: Setting) -> dict[str, float]:
    """Microseconds that a call of each op costs on one row, where there is next to nothing to compute."""
    costs = {}
    for op in OPS:
        tiny = getattr(module_of(op), "tiny", None)
        if tiny is not None:
            with torch.no_grad():
                call = tiny(setting)
                seconds_of(call, 100, "cpu")
                costs[op] = round(1e6 * min(seconds_of(call, 200, "cpu") for _ in range(5)), 2)
    return costs


def run(
    benches: tuple[str, ...] = BENCHES,
    setting: Setting | None = None,
    peers: tuple[str, ...] | None = None,
    rounds: int | None = None,
    folder: Path | None = None,
    progress: Progress = lambda text: None,
    wrap: Callable[[list], Any] = lambda steps: steps,
) -> Results:
    """Runs benchmark files and returns what they measured; Ctrl-C returns what was measured before it.

    Args:
        benches: which files, `BENCHES` by default.
        setting: device and size.
        peers: only these peers next to ours; all by default.
        rounds: how often each candidate runs at most; 15 for ops and 5 for models by default, 3 with `quick`.
        folder: where bench.json and bench.csv are written after every piece of work.
        progress: called with the name of what is timed next.
        wrap: puts a progress bar around the list of steps.
    """
    with freed_pages_kept() as kept:
        pages = "kept" if kept else "as the system has it"
        return _run(benches, setting or Setting(), peers, rounds, folder, progress, wrap, pages)


def _run(
    benches: tuple[str, ...],
    setting: Setting,
    peers: tuple[str, ...] | None,
    rounds: int | None,
    folder: Path | None,
    progress: Progress,
    wrap: Callable[[list], Any],
    pages: str,
) -> Results:
    progress("measuring the machine's limits")
    limits = machine_limits.measure(setting.device, setting.dtypes, setting.quick)
    facts = {**machine(setting.device), "freed pages": pages}
    rows: list[Row] = []
    costs: dict[str, float] = {}

    def results(complete: bool) -> Results:
        found = Results(facts, tuple(rows), dataclasses.asdict(limits), costs, complete)
        if folder is not None:
            found.write(folder)
        return found

    current: list[Row] = []
    try:
        progress("the cost of a call")
        costs.update(call_costs(setting))
        steps = [(work, mode) for work in works(benches, setting) for mode in work.modes]
        for work, mode in wrap(steps):
            progress(f"{work.bench} {work.shape} {work.dtype_name} {mode}")
            count = rounds or (3 if setting.quick else 5 if work.bench in ("model", "block", "patch") else 15)
            current = []
            for found in run_work(work, mode, setting, peers, count, limits):
                current = found
            rows += current
            current = []
            results(False)
    except KeyboardInterrupt:
        rows += current
        return results(False)
    return results(True)
