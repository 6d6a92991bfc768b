"""Measures launch configurations on the GPU at hand and writes the best to a file that the package reads.

    python -m internvit.kernels.tools.tune --out ~/.cache/internvit/sm_90.json [--only attention] [--pruned]

Unmeasured: no GPU has run this yet. The published models train for one step while the calls of their launch functions
are recorded; each candidate runs on all calls that would take its configuration (attention with QK-norm inside and
without, with whole tiles and a masked one), and is timed on the first with cold L2 (a buffer larger than it is written
between runs). Candidates are interleaved and compared by their medians. A configuration is kept only where it beats the
analytic rule by 2 % and its results differ from the rule's by no more than the inputs' rounding. The file is written
anew after each kernel: a run that is cut short keeps what it has measured. After attention's kernels, attention with
QK-norm inside is timed beside a library's without (`tune_backends`), and the file names the library where it wins.
"""

import argparse
import functools
import itertools
import json
import statistics
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import internvit
from internvit import InternViT, InternViTConfig
from internvit.benchmarks.harness import tune_backends
from internvit.benchmarks.harness.tune_backends import FUSED, OP
from internvit.files import atomic_write
from internvit.kernels.attention.config import AttentionConfig, tuned_key
from internvit.kernels.common.config import Call, record_calls, tuned_files
from internvit.kernels.common.launch import target_of
from internvit.kernels.common.rows import RowConfig
from internvit.kernels.common.target import TARGETS, Target
from internvit.kernels.gelu import GeluConfig
from internvit.kernels.linear import LinearConfig
from internvit.numerics import relative_error

ROUNDS = 20
DEVICE = "cuda"
BATCH = 8
MODELS = tuple(
    InternViTConfig.from_name(name).replace(name=None, num_hidden_layers=2, drop_path_rate=0.0)
    for name in ("internvit-6b-448px-v2.5", "internvit-300m-448px")
)
WIDE = (448, 532)
"""A second image size: 1217 tokens, neither whole tiles nor one more."""


def candidates(config: Any, pruned: bool = False) -> Iterator[Any]:
    """Configurations of the rule's type to try beside it; `pruned`: those next to it, for a run of minutes."""
    if pruned and isinstance(config, RowConfig):
        yield from (RowConfig(max(1, config.rows // 2), config.warps), RowConfig(2 * config.rows, config.warps))
    elif pruned and isinstance(config, AttentionConfig):
        tiles = itertools.product((64, 128), (32, 64), (config.warps,), (2, 3))
        yield from itertools.starmap(AttentionConfig, tiles if config.columns else ())
    elif pruned:
        return
    elif isinstance(config, RowConfig):
        yield from itertools.starmap(RowConfig, itertools.product((1, 2, 4, 8), (2, 4, 8, 16)))
    elif isinstance(config, AttentionConfig):
        tiles = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        yield from itertools.starmap(AttentionConfig, tiles)
    elif isinstance(config, LinearConfig):
        wide = itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (2, 3, 4))
        yield from itertools.starmap(LinearConfig, wide)
    elif isinstance(config, GeluConfig):
        yield from itertools.starmap(GeluConfig, itertools.product((512, 1024, 2048), (2, 4, 8)))


def model_calls(config: InternViTConfig, dtype: torch.dtype, device: str) -> dict[tuple[str, str], list[Call]]:
    """The calls of training steps by (kernel, key), one for each rounding of QK-norm and each image size, and the GEMMs
    of a forward without gradients.

    Attention's come first: most is to be won there.
    """
    model = InternViT(config, device=device).to(dtype).train()
    calls: dict[tuple[str, str], list[Call]] = {}
    for rounding, size in (("fused", config.image_hw), ("fused", WIDE), ("reference", config.image_hw)):
        model.set_rounding(rounding)
        pixels = torch.randn(BATCH, 3, *size, device=device).to(dtype)
        # backward's calls are recorded in this thread
        with internvit.backend("triton"), torch.autograd.set_multithreading_enabled(False), record_calls() as recorded:
            model(pixels).last_hidden_state.float().sum().backward()
        _keep_last(calls, recorded)
    with internvit.backend("triton_gemm"), torch.no_grad(), record_calls() as recorded:
        model.eval()(pixels)
    _keep_last(calls, [call for call in recorded if isinstance(call.config, LinearConfig)])
    return dict(sorted(calls.items(), key=lambda item: not item[0][0].startswith("attention")))


def _keep_last(calls: dict[tuple[str, str], list[Call]], recorded: list[Call]) -> None:
    for call in {(call.kernel, call.key): call for call in recorded}.values():
        calls.setdefault((call.kernel, call.key), []).append(call)


def _outputs(call: Call, config: Any) -> list[Tensor]:
    """What the call returns and the tensors it writes to, as float32 rows summed where their number is the config's."""
    args = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, call.args)
    returned = call.function(config, *args)
    return [t for t in tree_leaves((returned, args)) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def _agree(call: Call, actual: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether results differ by no more than the coarsest input's rounding; partial rows are compared by their sum."""
    eps = max(torch.finfo(t.dtype).eps for t in tree_leaves(call.args) if isinstance(t, Tensor))
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            a, b = (t.flatten(0, -2).sum(0) for t in (a, b))
        if not relative_error(a.double(), b.double()) <= 2 * eps:
            return False
    return True


def measure(calls: Mapping[Any, Callable[[], Any]], device: str) -> dict[Any, float]:
    """Median milliseconds of each call, interleaved, L2 cold; on a CPU, where it is rehearsed, each runs once."""
    if device == "cpu":
        return {key: 1e3 * timeit.timeit(call, number=1) for key, call in calls.items()}
    flush = torch.empty(256 << 20, dtype=torch.int8, device=device)
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


def best(calls: list[Call], device: str, pruned: bool = False) -> Any:
    """The fastest configuration that agrees with the rule's results; the rule's itself unless beaten by 2 %."""
    first = calls[0]
    rule, expected = first.config, [_outputs(call, first.config) for call in calls]
    agreeing = [rule]
    for config in candidates(rule, pruned):
        try:
            if config != rule and all(
                _agree(call, _outputs(call, config), results) for call, results in zip(calls, expected, strict=True)
            ):
                agreeing.append(config)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
    timed = {config: functools.partial(first.function, config, *first.args) for config in agreeing}
    times = measure(timed, device)
    fastest = min(times, key=lambda config: times[config])
    return fastest if times[fastest] < 0.98 * times[rule] else rule


def tune(
    target: Target,
    models: Iterable[InternViTConfig],
    dtypes: Iterable[torch.dtype],
    only: str,
    keep: Callable[[dict[str, dict[str, Any]], dict[str, dict[str, Any]]], None],
    device: str = DEVICE,
    pruned: bool = False,
) -> None:
    """Calls `keep` with all configurations and backends measured so far after each kernel, or op, in whose name one of
    the comma-separated words of `only` is."""
    configs: dict[str, dict[str, Any]] = {}
    backends: dict[str, dict[str, Any]] = {}
    measured: set[tuple[str, str]] = set()

    def is_due(name: str, key: str) -> bool:
        due = any(word in name for word in only.split(",")) and (name, key) not in measured
        measured.update({(name, key)} if due else ())
        return due

    def tune_kernel(kernel: str, key: str, calls: list[Call]) -> None:
        found, rule = best(calls, device, pruned), calls[0].config
        print(f"{target.name} {kernel} {key}: {found}{'' if found != rule else ' (the rule)'}", flush=True)
        if found != rule:
            configs.setdefault(kernel, {})[key] = asdict(found)
        keep(configs, backends)

    def compare_backends(key: str, config: InternViTConfig, dtype: torch.dtype) -> None:
        faster, why = tune_backends.faster_backend(config, dtype, device, BATCH, measure, configs)
        print(f"{target.name} {OP} {key}: {faster.library if faster else FUSED} ({why})", flush=True)
        if faster is not None:
            backends.setdefault(OP, {})[key] = faster._asdict()
        keep(configs, backends)

    for dtype, config in itertools.product(dtypes, models):
        recorded = model_calls(config, dtype, device)
        first = [each for each in recorded if each[0].startswith("attention")]
        for kernel, key in filter(lambda each: is_due(*each), first):
            tune_kernel(kernel, key, recorded[kernel, key])
        key = tuned_key(config.head_dim, dtype)
        if config.qk_normalization and is_due(OP, key):
            compare_backends(key, config, dtype)
        for kernel, key in filter(lambda each: is_due(*each), [each for each in recorded if each not in first]):
            tune_kernel(kernel, key, recorded[kernel, key])


def write(path: Path, configs: dict[str, Any], backends: dict[str, Any] | None = None, /, **about: str) -> None:
    """Puts the file in place in one step: another process reads the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_text(json.dumps({**about, "configs": configs, "backends": backends or {}}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m internvit.kernels.tools.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="~/.cache/internvit/TARGET.json is read at run time")
    parser.add_argument("--only", default="", help="only kernels and ops whose name contains one of these words")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--pruned", action="store_true", help="few candidates next to the rule: minutes")
    parser.add_argument(
        "--rehearse", metavar="TARGET", choices=tuple(TARGETS), help="small models without a GPU: nothing is computed"
    )
    args = parser.parse_args()
    args.out = args.out.expanduser()
    if args.out.is_dir():
        parser.error(f"--out: expected a file, got the folder {args.out}")
    dtypes = [getattr(torch, d) for d in args.dtype]
    about = {"torch": torch.__version__, "triton": triton.__version__}
    if args.rehearse:
        _rehearse(args, dtypes, about)
        return
    if not torch.cuda.is_available():
        parser.exit(1, "tune: no GPU is visible to torch; launch configurations stay those of the analytic rules\n")
    target = target_of(torch.empty(0, device=DEVICE))
    about |= {"target": target.name, "device": torch.cuda.get_device_name()}
    tune(target, MODELS, dtypes, args.only, lambda *found: write(args.out, *found, **about), DEVICE, args.pruned)
    if args.out not in tuned_files(target):
        print(f"tune: {args.out} is not read from where it is; put it at {tuned_files(target)[0]}")


def _rehearse(args: argparse.Namespace, dtypes: list[torch.dtype], about: dict[str, str]) -> None:
    """All that tuning does but for running kernels: they are compiled for the target."""
    from internvit.kernels.tools.compile_only import compile_and_look_up, intercepting, triton_takes_cpu_tensors

    target, small = TARGETS[args.rehearse], {"image_size": 56, "intermediate_size": 64}
    models = [
        model.replace(**small, hidden_size=2 * (model.hidden_size // model.num_attention_heads), num_attention_heads=2)
        for model in MODELS
    ]
    about |= {"target": target.name, "device": "none, rehearsed"}
    with intercepting(target, compile_and_look_up), triton_takes_cpu_tensors():
        tune(target, models, dtypes, args.only, lambda *found: write(args.out, *found, **about), "cpu", args.pruned)


if __name__ == "__main__":
    main()
