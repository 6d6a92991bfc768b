"""Each upstream's model patched in place, next to the same model unpatched.

InternViT-300M's width at 448 px, batch 1, 4 layers, random weights; mmseg's backbone has RMSNorm and QK-norm.
OpenGVLab's and mmseg's classes are restated in tests/upstream; without flash-attn their attention is the naive one.
`patch(verify=True)` compares both before anything is timed.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

import internvit
from internvit.benchmarks.harness.cases import FORWARD, OURS, BenchmarkCase, Implementation, MissingPeerError, Setting
from internvit.benchmarks.model.bench_block import flops_of
from internvit.benchmarks.model.bench_model import trained_like
from internvit.numerics import product_violations

UPSTREAMS = ("opengvlab", "transformers", "timm", "mmseg")


def patch_case(setting: Setting, upstream: str, dtype: torch.dtype, layers: int, size: int) -> BenchmarkCase:
    config = internvit.InternViTConfig.from_name("internvit-300m-448px").replace(
        num_hidden_layers=layers, image_size=size, drop_path_rate=0.0, name=None
    )
    if upstream == "mmseg":
        config = config.replace(norm_type="rms_norm", qkv_bias=False, qk_normalization=True)
    generator = setting.generator()

    def model(of: torch.dtype = dtype) -> torch.nn.Module:
        if importlib.util.find_spec("tests") is None:
            raise MissingPeerError("the upstream classes are in the checkout's tests folder")
        judge = getattr(importlib.import_module("tests.support.models"), f"{upstream}_judge")
        return judge(config, trained_like(config)).to(setting.device, of)

    def features(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
        return functools.partial(importlib.import_module("tests.support.models").features, model)

    def patched() -> Callable[[Tensor], Tensor]:
        found = model()
        internvit.patch(found, verify=True)
        return features(found)

    def inputs() -> tuple[Tensor]:
        return (torch.randn(1, 3, size, size, generator=generator).to(setting.device, dtype),)

    def violations(result: Tensor, inputs: tuple[Tensor]) -> list[str]:
        with torch.no_grad():
            emulation = features(model())(inputs[0])
            truth = features(model(torch.float64))(inputs[0].double())
        return product_violations(result, truth, emulation, 1.1 if dtype != torch.float32 else 2.0)

    return BenchmarkCase(
        "patch",
        f"{upstream} {layers} layers, {size} px",
        dtype,
        inputs,
        (
            Implementation(f"{OURS} patched", patched, trains=False),
            Implementation("unpatched", lambda: features(model())),
        ),
        violations,
        flops={FORWARD: layers * flops_of(config, 1, 1 + (size // config.patch_size) ** 2)},
    )


def cases(setting: Setting) -> list[BenchmarkCase]:
    layers, size = (1, 224) if setting.quick else (4, 448)
    # On a CPU float32 is timed for OpenGVLab's alone: the others' differ from it by their attention, as in bfloat16.
    every = setting.device.startswith("cuda") or setting.quick
    return [
        patch_case(setting, name, dtype, layers, size)
        for name in UPSTREAMS
        for dtype in (setting.dtypes if every or name == UPSTREAMS[0] else setting.dtypes[:1])
    ]


def test_patch(timed) -> None:
    timed()
