"""Measures launch configurations on the GPU at hand and writes the best to a file that the package reads.

    python -m internvit.kernels.tools.tune --out ~/.cache/internvit/sm_90.json [--only attention] [--dtype bfloat16]

Unmeasured: no GPU has run this yet. The published models train for one step while the calls of their launch functions
are recorded; each candidate runs on all calls that would take its configuration (attention with QK-norm inside and
without, with whole tiles and a masked one), and is timed on the first with cold L2 (a buffer larger than it is written
between runs). Candidates are interleaved and compared by their medians. A configuration is kept only where it beats the
analytic rule by 2 % and its results differ from the rule's by no more than the inputs' rounding. The file is written
anew after each kernel: a run that is cut short keeps what it has measured.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import internvit
from internvit import InternViT, InternViTConfig
from internvit.files import atomic_write
from internvit.kernels.attention.config import AttentionConfig
from internvit.kernels.common.config import Call, record_calls, tuned_files
from internvit.kernels.common.launch import target_of
from internvit.kernels.common.rows import RowConfig
from internvit.kernels.common.target import Target
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


def candidates(config: Any) -> Iterator[Any]:
    """Configurations of the rule's type to try beside it."""
    if isinstance(config, RowConfig):
        yield from itertools.starmap(RowConfig, itertools.product((1, 2, 4, 8), (2, 4, 8, 16)))
    elif isinstance(config, AttentionConfig):
        tiles = itertools.product((64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
        yield from itertools.starmap(AttentionConfig, tiles)
    elif isinstance(config, LinearConfig):
        wide = itertools.product((64, 128), (128, 256), (32, 64), (4, 8), (2, 3, 4))
        yield from itertools.starmap(LinearConfig, wide)
    elif isinstance(config, GeluConfig):
        yield from itertools.starmap(GeluConfig, itertools.product((512, 1024, 2048), (2, 4, 8)))


def model_calls(config: InternViTConfig, dtype: torch.dtype) -> dict[tuple[str, str], list[Call]]:
    """The calls of training steps by (kernel, key), one for each rounding of QK-norm and each image size, and the GEMMs
    of a forward without gradients."""
    model = InternViT(config, device=DEVICE).to(dtype).train()
    calls: dict[tuple[str, str], list[Call]] = {}
    for rounding, size in (("fused", config.image_hw), ("fused", WIDE), ("reference", config.image_hw)):
        model.set_rounding(rounding)
        pixels = torch.randn(BATCH, 3, *size, device=DEVICE).to(dtype)
        # backward's calls are recorded in this thread
        with internvit.backend("triton"), torch.autograd.set_multithreading_enabled(False), record_calls() as recorded:
            model(pixels).last_hidden_state.float().sum().backward()
        _keep_last(calls, recorded)
    with internvit.backend("triton_gemm"), torch.no_grad(), record_calls() as recorded:
        model.eval()(pixels)
    _keep_last(calls, [call for call in recorded if isinstance(call.config, LinearConfig)])
    return calls


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


def measure(calls: dict[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median milliseconds of each call, interleaved, L2 cold."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
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


def best(calls: list[Call]) -> Any:
    """The fastest configuration that agrees with the rule's results; the rule's itself unless beaten by 2 %."""
    first = calls[0]
    rule, expected = first.config, [_outputs(call, first.config) for call in calls]
    agreeing = [rule]
    for config in candidates(rule):
        try:
            if config != rule and all(
                _agree(call, _outputs(call, config), results) for call, results in zip(calls, expected, strict=True)
            ):
                agreeing.append(config)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
    times = measure({config: lambda config=config: first.function(config, *first.args) for config in agreeing})  # type: ignore[misc]
    fastest = min(times, key=lambda config: times[config])
    return fastest if times[fastest] < 0.98 * times[rule] else rule


def tune(
    target: Target, dtypes: Iterable[torch.dtype], only: str, keep: Callable[[dict[str, dict[str, Any]]], None]
) -> None:
    """Calls `keep` with all configurations measured so far after each kernel whose name contains `only`."""
    configs: dict[str, dict[str, Any]] = {}
    measured: set[tuple[str, str]] = set()
    for dtype, config in itertools.product(dtypes, MODELS):
        for (kernel, key), calls in model_calls(config, dtype).items():
            if only not in kernel or (kernel, key) in measured:
                continue
            measured.add((kernel, key))
            found, rule = best(calls), calls[0].config
            print(f"{target.name} {kernel} {key}: {found}{'' if found != rule else ' (the rule)'}", flush=True)
            if found != rule:
                configs.setdefault(kernel, {})[key] = asdict(found)
            keep(configs)


def write(path: Path, configs: dict[str, Any], **about: str) -> None:
    """Puts the file in place in one step: another process reads the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as draft:
        draft.write_text(json.dumps({**about, "configs": configs}, indent=1) + "\n")


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
        parser.exit(1, "tune: no GPU is visible to torch; launch configurations stay those of the analytic rules\n")
    target = target_of(torch.empty(0, device=DEVICE))
    about = {"target": target.name, "device": torch.cuda.get_device_name()}
    about |= {"torch": torch.__version__, "triton": triton.__version__}
    dtypes = [getattr(torch, d) for d in args.dtype]
    tune(target, dtypes, args.only, lambda configs: write(args.out, configs, **about))
    if args.out not in tuned_files(target):
        print(f"tune: {args.out} is not read from where it is; put it at {tuned_files(target)[0]}")


if __name__ == "__main__":
    main()
