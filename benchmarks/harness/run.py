"""Times benchmark cases: the numerics contract first, then interleaved rounds. A wrong result is not timed."""

import dataclasses
import functools
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
    BenchmarkCase,
    Implementation,
    MissingPeerError,
    Setting,
    gradients,
    leaves,
    row_cases,
    tensors,
)
from internvit.benchmarks.harness.results import Results, Row, machine, read, with_speedups
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
from internvit.ops.core.spec import TINY, Inputs, every_spec

_FOLDER = Path(__file__).resolve().parents[1]


def has_file(op: str) -> bool:
    return (_FOLDER / f"ops/bench_{op}.py").is_file()


OPS = tuple(name for name, spec in every_spec().items() if has_file(name) or spec.implemented_as == name)
LEAST_ROUNDS, MOST_SECONDS = 5, 6.0
"""A case that takes longer than so many seconds gets no more than five rounds: its spread is small beside it."""
BENCHES = (*OPS, "block", "patch", "model")
Progress = Callable[[str], None]


def cases(benches: tuple[str, ...], setting: Setting) -> list[BenchmarkCase]:
    """The cases of these benchmarks: those of an op's file, or its example at the sizes of row ops."""
    found: list[BenchmarkCase] = []
    for bench in benches:
        if bench in OPS and not has_file(bench):
            found += row_cases(setting, bench)
            continue
        folder = "ops" if bench in OPS else "model"
        found += importlib.import_module(f"internvit.benchmarks.{folder}.bench_{bench}").cases(setting)
    return found


def checked(
    case: BenchmarkCase, implementation: Implementation, mode: str, function: Callable[..., Any]
) -> tuple[list[str], float | None]:
    """What an implementation's result, or its gradients, break of the numerics contract, for ours; and the result's
    error to float32, where the case has one. `function` as built."""
    error: float | None = None
    failures: list[str] = []
    with torch.no_grad() if mode == FORWARD else nullcontext():
        inputs = case.inputs()
        if mode == FORWARD and (implementation.ours or case.error is not None):
            result = function(*inputs)
            error = None if case.error is None else case.error(result, inputs)
            most = implementation.most_error
            if most is not None and (error is None or not error <= most):
                failures = [f"a relative error of {error} is over {most}"]
            elif most is None and implementation.ours:
                failures = case.violations(result, inputs)
        elif mode != FORWARD and implementation.ours:
            assert case.gradient_violations is not None
            inputs = leaves(inputs)
            incoming = tuple(torch.randn_like(t) for t in tensors(function(*inputs)))
            failures = case.gradient_violations(gradients(function, inputs, incoming), inputs, incoming)
    return failures, error


def callable_for(
    case: BenchmarkCase, mode: str, function: Callable[..., Any]
) -> tuple[Callable[..., Any], list[tuple]]:
    """What is timed, and the sets of arguments it takes in turn."""
    first = case.inputs()
    sets = [first, *(case.inputs() for _ in range(copies_past_cache(first, str(tensors(first)[0].device)) - 1))]
    if mode == FORWARD:

        def forward(*inputs: Any) -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward, sets
    sets = [leaves(inputs) for inputs in sets]
    incoming = tuple(torch.randn_like(t) for t in tensors(function(*sets[0])))
    return lambda *inputs: gradients(function, inputs, incoming), sets


def _prepare(
    case: BenchmarkCase, implementation: Implementation, mode: str, setting: Setting
) -> tuple[Callable[[], object], Callable[..., Any], list[tuple], int | None, float | None] | str:
    """What is timed, its call and arguments, the memory it takes and its error; or why it is not timed."""
    try:
        function = implementation.build()
        failures, error = checked(case, implementation, mode, function)
        if failures:
            return f"refused, the result is wrong: {'; '.join(failures)}"
        call, sets = callable_for(case, mode, function)
        candidate = rotating(call, sets)
        return candidate, call, sets, peak_bytes(candidate, setting.device), error
    except MissingPeerError as gap:
        return str(gap)
    except Exception as problem:
        lines = str(problem).strip().splitlines() or [""]
        return f"failed: {type(problem).__name__}: {lines[0]}"


def run_case(
    case: BenchmarkCase,
    mode: str,
    setting: Setting,
    peers: tuple[str, ...] | None,
    rounds: int,
    limits: machine_limits.Limits,
) -> Iterator[list[Row]]:
    """The rows of one case, after each round."""
    common = {
        "bench": case.bench,
        "shape": case.shape,
        "dtype": case.dtype_name,
        "mode": mode,
        "sizes": {**case.sizes, "bytes": int(case.bytes.get(mode, 0)), "flops": int(case.flops.get(mode, 0))},
    }
    gaps: list[Row] = []
    ready: dict[tuple[str, str], Callable[[], object]] = {}
    calls: dict[tuple[str, str], int] = {}
    memory: dict[tuple[str, str], int | None] = {}
    facts: dict[str, dict[str, Any]] = {}
    for implementation in case.implementations:
        if not _is_asked(implementation, mode, peers):
            continue
        row = Row(**common, launch="eager", variant=implementation.name)  # type: ignore[arg-type]
        prepared = _prepare(case, implementation, mode, setting)
        if isinstance(prepared, str):
            gaps.append(dataclasses.replace(row, note=prepared))
            continue
        candidate, call, sets, held, error = prepared
        facts[implementation.name] = common | {"error": error}
        ready[implementation.name, "eager"] = candidate
        calls[implementation.name, "eager"] = 1
        memory[implementation.name, "eager"] = held
        if setting.device.startswith("cuda"):
            try:
                replay, count = graphed(call, sets)
            except RuntimeError as problem:
                note = f"no CUDA graph: {str(problem).splitlines()[0]}"
                gaps.append(dataclasses.replace(row, launch="CUDA graph", note=note))
                continue
            ready[implementation.name, "CUDA graph"], calls[implementation.name, "CUDA graph"] = replay, count
    least, limit = limits.seconds(case.bytes.get(mode, 0.0), case.flops.get(mode, 0.0), case.dtype_name)
    yield gaps
    labels = {f"{name}|{launch}": (name, launch) for name, launch in ready}
    candidates = {label: ready[key] for label, key in labels.items()}
    begin = time.monotonic()
    for done, times in enumerate(interleaved(candidates, rounds, device=setting.device), 1):
        timed = [
            _row(facts[key[0]], key, times[label], calls[key], memory.get(key), least, limit)
            for label, key in labels.items()
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
    """Microseconds that a call of each op costs on a few rows, where there is next to nothing to compute."""
    costs = {}
    for name, spec in every_spec().items():
        arguments = next(iter(spec.examples.values()))(Inputs(TINY, setting.generator(), device=setting.device))
        with torch.no_grad():
            call = functools.partial(spec.function, **arguments)
            seconds_of(call, 100, "cpu")
            costs[name] = round(1e6 * min(seconds_of(call, 200, "cpu") for _ in range(5)), 2)
    return costs


def run(
    benches: tuple[str, ...] = BENCHES,
    setting: Setting | None = None,
    peers: tuple[str, ...] | None = None,
    rounds: int | None = None,
    folder: Path | None = None,
    progress: Progress = lambda text: None,
    wrap: Callable[[list], Any] = lambda steps: steps,
    compiles_last: bool = False,
    resume: bool = False,
) -> Results:
    """Runs benchmark files and returns what they measured; Ctrl-C returns what was measured before it.

    Args:
        benches: which files, `BENCHES` by default.
        setting: device and size.
        peers: only these peers next to ours; all by default.
        rounds: how often each candidate runs at most; 15 for ops and 5 for models by default, 3 with `quick`.
        folder: where bench.json and bench.csv are written after every piece of case.
        progress: called with the name of what is timed next.
        wrap: puts a progress bar around the list of steps.
        compiles_last: implementations that torch.compile builds come after all others, beside ours once more.
        resume: rows in `folder` that this device measured are kept, and not measured again.
    """
    with freed_pages_kept() as kept:
        pages = "kept" if kept else "as the system has it"
        steps = functools.partial(_steps, benches, setting or Setting(), compiles_last)
        return _run(steps, setting or Setting(), peers, rounds, folder, progress, wrap, pages, resume)


def _new(found: list[Row], rows: list[Row]) -> list[Row]:
    """The rows found that are not there yet: what is timed again beside another is kept from the first time."""
    known = {row.key for row in rows}
    return [row for row in found if row.key not in known]


Step = tuple[BenchmarkCase, str]


def _steps(benches: tuple[str, ...], setting: Setting, compiles_last: bool) -> list[Step]:
    """(case, mode) in the order in which they are timed."""
    steps = [(case, mode) for case in cases(benches, setting) for mode in case.modes]
    if not compiles_last:
        return steps

    def of(case: BenchmarkCase, keep: Callable[[Implementation], bool]) -> BenchmarkCase:
        return dataclasses.replace(case, implementations=tuple(filter(keep, case.implementations)))

    early = [(of(case, lambda one: not one.compiles), mode) for case, mode in steps]
    late = [
        (of(case, lambda one: one.ours or one.compiles), mode)
        for case, mode in steps
        if any(one.compiles for one in case.implementations)
    ]
    return early + late


def _measured(folder: Path | None, facts: dict[str, Any]) -> list[Row]:
    """The rows that an earlier run left in `folder` on the same device, with the same torch and code."""
    if folder is None or not (folder / "bench.json").is_file():
        return []
    earlier = read(folder)
    same = all(earlier.machine.get(name) == facts.get(name) for name in ("device", "torch", "versions", "sources"))
    return list(earlier.rows) if same else []


def _is_asked(implementation: Implementation, mode: str, peers: tuple[str, ...] | None) -> bool:
    if mode == BOTH and not implementation.trains:
        return False
    return implementation.ours or peers is None or implementation.name in peers


def _is_measured(case: BenchmarkCase, mode: str, peers: tuple[str, ...] | None, rows: list[Row]) -> bool:
    names = {one.name for one in case.implementations if _is_asked(one, mode, peers)}
    work = case.bench, case.shape, case.dtype_name, mode
    return names <= {row.variant for row in rows if row.work[:4] == work}


def _run(
    plan: Callable[[], list[Step]],
    setting: Setting,
    peers: tuple[str, ...] | None,
    rounds: int | None,
    folder: Path | None,
    progress: Progress,
    wrap: Callable[[list], Any],
    pages: str,
    resume: bool,
) -> Results:
    progress("measuring the machine's limits")
    limits = machine_limits.measure(setting.device, setting.dtypes, setting.quick)
    facts = {**machine(setting.device), "freed pages": pages}
    rows: list[Row] = _measured(folder, facts) if resume else []
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
        for case, mode in wrap([step for step in plan() if not _is_measured(*step, peers, rows)]):
            progress(f"{case.bench} {case.shape} {case.dtype_name} {mode}")
            count = rounds or (3 if setting.quick else 5 if case.bench in ("model", "block", "patch") else 15)
            current = []
            for found in run_case(case, mode, setting, peers, count, limits):
                current = _new(found, rows)
            rows += current
            current = []
            results(False)
    except KeyboardInterrupt:
        rows += current
        return results(False)
    return results(True)
