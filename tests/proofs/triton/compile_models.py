"""Compiles every kernel that whole models launch, through Triton's own JIT, for a GPU that is not there.

    python -m tests.proofs.triton.compile_models [sm_90 ...]

A Triton driver that launches nothing answers the device's properties; the JIT specialises each launch on None, 1,
divisibility by 16 and alignment as it would on a GPU, and compiles it. Tensors are on the CPU and their values are
never computed. Prints a line for each way of running a model; the exit status is 1 if a kernel failed to compile.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import internvit
from internvit import InternViT, InternViTConfig
from internvit.kernels.common import launch

PIXELS = (2, 3, 56, 70)  # not the native grid


class CompileOnlyDriver:
    """A `triton.runtime.driver` whose launches do nothing."""

    class Utils:
        def __init__(self, target: launch.Target) -> None:
            self.target = target

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {
                "max_shared_mem": self.target.shared_bytes,
                "multiprocessor_count": self.target.multiprocessors,
                "warpSize": self.target.warp_size,
                "max_num_regs": 65536,
            }

        def load_binary(self, *args: Any) -> tuple[int, ...]:
            return 1, 1, 32, 0, 1024  # module, function, registers, spills, most threads

        def unload_module(self, *args: Any) -> None:
            pass

    class Launcher:
        def __init__(self, source: Any, metadata: Any) -> None:
            pass

        def __call__(self, *args: Any) -> None:
            pass

    def __init__(self, target: launch.Target) -> None:
        self.target = target
        self.utils = self.Utils(target)
        self.launcher_cls = self.Launcher

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        if self.target.is_amd:
            return GPUTarget("hip", self.target.name, self.target.warp_size)
        return GPUTarget("cuda", int(self.target.name.removeprefix("sm_")), self.target.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def tower(name: str, dtype: torch.dtype, **changes: Any) -> InternViT:
    """Two blocks of a published configuration, uninitialised."""
    config = InternViTConfig.from_name(name).replace(name=None, image_size=56, num_hidden_layers=2, **changes)
    return InternViT(config, device="meta").to_empty(device="cpu").to(dtype)


def ways(name: str, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(what a user does, the call) for each way of running a model on a GPU."""
    pixels = torch.zeros(PIXELS, dtype=dtype)

    def train(model: InternViT) -> None:
        model.train()(pixels).last_hidden_state.float().sum().backward()

    def evaluate(model: Any) -> None:
        with torch.no_grad():
            model.eval()(pixels)

    def checkpointed(mode: str) -> None:
        model = tower(name, dtype)
        model.set_gradient_checkpointing(mode)
        train(model)

    def lora_like() -> None:
        model = tower(name, dtype)
        for parameter, tensor in model.named_parameters():
            tensor.requires_grad_("qkv" in parameter)
        train(model)

    def folded() -> None:
        model = tower(name, dtype)
        model.set_layer_scale_folding(True)
        train(model)

    def residual_float32(run: Callable[[InternViT], None]) -> None:
        model = tower(name, dtype)
        model.residual_dtype = torch.float32
        run(model)

    def optimized(model: InternViT) -> None:
        evaluate(internvit.optimize_for_inference(model.eval(), pack=False))  # packed weights are for CPUs

    yield "eval", lambda: evaluate(tower(name, dtype))
    yield "optimize_for_inference", lambda: optimized(tower(name, dtype))
    yield "train", lambda: train(tower(name, dtype))
    yield "train, DropPath", lambda: train(tower(name, dtype, drop_path_rate=0.1))
    yield "train, qkv alone", lora_like
    for mode in ("selective", "block"):
        yield f"train, {mode} checkpointing", lambda mode=mode: checkpointed(mode)
    if dtype != torch.float16:
        yield "train, LayerScale folded", folded
    if dtype != torch.float32:
        yield "eval, float32 residual", lambda: residual_float32(evaluate)
        yield "optimize_for_inference, float32 residual", lambda: residual_float32(optimized)
        yield "train, float32 residual", lambda: residual_float32(train)


def compile_all(target: launch.Target, names: list[str], dtypes: list[torch.dtype]) -> int:
    """The number of ways in which a kernel failed to compile."""
    driver.set_active(CompileOnlyDriver(target))
    failed = 0
    for name in names:
        for dtype in dtypes:
            for way, run in ways(name, dtype):
                label = f"{target.name} {name} {str(dtype).removeprefix('torch.')}: {way}"
                try:
                    run()
                except Exception as error:
                    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
                    print(f"FAILED {label}: {type(error).__name__}: {lines[-1]}", flush=True)
                    failed += 1
                else:
                    print(f"ok     {label}", flush=True)
    return failed


def main() -> int:
    folder = Path(launch.__file__).resolve().parents[1]
    for path in sorted(folder.rglob("*.py")):
        importlib.import_module(".".join(["internvit.kernels", *path.relative_to(folder).with_suffix("").parts]))
    os.environ["TRITON_INTERPRET"] = "1"  # only now: the backend takes CPU tensors, kernels are compiled all the same
    failed = 0
    for name in sys.argv[1:] or ["sm_90"]:
        target = launch.TARGETS[name]
        with mock.patch.object(launch, "target_of", lambda x, target=target: target), internvit.backend("triton"):
            failed += compile_all(target, ["internvit-300m-448px", "internvit-6b-448px-v2.5"], [torch.bfloat16])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
