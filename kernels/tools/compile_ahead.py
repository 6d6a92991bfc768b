"""Compiles what models launch, and what the tuner tries, on all cores into Triton's cache: no GPU waits for it.

    python -m internvit.kernels.tools.compile_ahead [--target sm_90] [--kernels models tuning] [--jobs 16] [--count]

No GPU is needed: the published models run on the CPU without computing anything (`model_launches`), and each distinct
kernel is compiled once, with the JIT's own key, so that the first launch on the GPU finds it. By default for the GPU at
hand. --count prints how many kernels there are, and compiles none.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Iterable

import torch

from internvit.kernels.common.launch import Launch
from internvit.kernels.common.target import TARGETS, Target, target_of_device
from internvit.kernels.tools import tune
from internvit.kernels.tools.compile_only import Specialization, compile_only
from internvit.kernels.tools.model_launches import kernel_uses

OWN_MODES = "^(?!.*patched)"
"""Models of other libraries launch nothing else, and a GPU machine may not have those libraries."""


def model_kernels(target: Target, dtypes: Iterable[torch.dtype]) -> list[Specialization]:
    """The distinct kernels that models launch."""
    return [use.specialization for use in kernel_uses(target, dtypes, only=OWN_MODES)]


def tuning_kernels(target: Target, dtype: torch.dtype) -> list[Specialization]:
    """The distinct kernels of the tuner's pruned candidates."""
    found: dict[Specialization, None] = {}

    def receive(one: Launch, specialization: Specialization) -> None:
        found[specialization] = None

    with compile_only(target, receive):
        for model in tune.MODELS:
            for calls in tune.model_calls(model, dtype, "cpu").values():
                for call in calls:
                    for config in tune.candidates(call.config, pruned=True):
                        call.function(config, *call.args)
    return list(found)


def _compile(specialization: Specialization, target: Target) -> str | None:
    """Why it does not compile; None where it does."""
    try:
        specialization.compile(target)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"{specialization.function}: {type(error).__name__}: {lines[-1]}"
    return None


def compile_all(specializations: list[Specialization], target: Target, jobs: int) -> list[str]:
    """Compiles in `jobs` processes; what failed."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        results = list(pool.map(_compile, specializations, [target] * len(specializations)))
    return [failure for failure in results if failure is not None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m internvit.kernels.tools.compile_ahead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--target", choices=tuple(TARGETS), help="the GPU at hand by default")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--kernels",
        nargs="+",
        default=["models"],
        choices=["models", "tuning"],
        help="what models launch; what the tuner's pruned candidates launch, in bfloat16",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, one a core by default")
    parser.add_argument("--first", type=int, metavar="N", help="only the first N kernels")
    parser.add_argument("--count", action="store_true", help="count the kernels and compile none")
    asked = parser.parse_args(arguments)
    if asked.target is None and not torch.cuda.is_available():
        parser.error("--target is needed: no GPU is visible to torch")
    target = TARGETS[asked.target] if asked.target else target_of_device(0)
    found: list[Specialization] = []
    if "models" in asked.kernels:
        found += model_kernels(target, [getattr(torch, name) for name in asked.dtype])
    if "tuning" in asked.kernels:
        found += tuning_kernels(target, torch.bfloat16)
    kernels = list(dict.fromkeys(found))
    if asked.count:
        print(len(kernels))
        return 0
    kernels = kernels[: asked.first]
    begin = time.monotonic()
    failures = compile_all(kernels, target, max(1, asked.jobs))
    for failure in failures:
        print(failure)
    seconds = time.monotonic() - begin
    print(f"{len(kernels) - len(failures)} of {len(kernels)} kernels compiled for {target.name} in {seconds:.0f} s")
    # A candidate of the tuner may want more than a GPU has, and is left out there; a model's kernel may not.
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
