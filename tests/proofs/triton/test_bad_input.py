"""What the triton backend cannot take is refused by name, with the way out."""

import os

import pytest
import torch

from internvit.kernels.common.launch import record
from internvit.kernels.common.target import TARGETS
from internvit.ops import attention, qk_norm_attention, rms_norm
from internvit.ops.backends.registry import BACKENDS, has_implementation, implementation
from internvit.ops.core.spec import SPECS, TINY, Inputs, Size
from tests.support.implementations import op_calls

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_cpu_tensors_outside_the_interpreter():
    with pytest.raises(ValueError, match=r"rms_norm: backend 'triton' cannot take this input: it runs on GPU tensors"):
        rms_norm(torch.zeros(2, 8), torch.ones(8), backend="triton")


def on_cuda(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.fixture(autouse=True)
def fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        yield


@pytest.mark.parametrize("op", [attention, qk_norm_attention], ids=lambda op: op.__name__)
@pytest.mark.parametrize(("head_dim", "got"), [(12, "got 12"), (136, "got 136")])
def test_head_dimensions(op, head_dim, got):
    q = on_cuda(1, 5, 2, head_dim)
    message = rf"^{op.__name__}: .* head dimension that is a multiple of 8 up to 128, {got}"
    with pytest.raises(ValueError, match=message):
        op(q, q, q, backend="triton")


CASES = {
    f"{name} {variant}".strip(): (spec, example)
    for name, spec in SPECS.items()
    if has_implementation(spec.implemented_as, "triton")
    for variant, example in spec.examples.items()
    if BACKENDS["triton"].lacks(**spec.demands(variant)) is None
}
every_op = pytest.mark.parametrize(("spec", "example"), CASES.values(), ids=CASES)


def arguments(example, make):
    """The example's arguments with tensors from `make`, called with a shape; integers keep their dtype."""
    given = {n: (a, make(a.shape)) for n, a in tensors_of(example).items()}
    made = {n: t if a.is_floating_point() else t.to(a.dtype) for n, (a, t) in given.items()}
    return {**example(Inputs(TINY, device="meta")), **made}


def tensors_of(example):
    return {n: a for n, a in example(Inputs(TINY, device="meta")).items() if isinstance(a, torch.Tensor)}


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
@every_op
def test_every_op_refuses_cpu_tensors_and_float64(spec, example):
    for make, got in (
        (torch.empty, "it runs on GPU tensors .* got cpu"),
        (lambda shape: on_cuda(*shape, dtype=torch.float64), "it takes float32, bfloat16, float16, got torch.float64"),
    ):
        message = rf"^{spec.name}: backend 'triton' cannot take this input: {got}; use backend='reference', or 'auto'"
        with pytest.raises(ValueError, match=message):
            spec.run(arguments(example, make), "triton")


@every_op
def test_every_argument_on_another_device_is_named(spec, example):
    for name in list(tensors_of(example))[1:]:
        given = arguments(example, lambda shape: on_cuda(*shape))
        given[name] = torch.empty(given[name].shape, dtype=given[name].dtype)
        with pytest.raises(ValueError, match=rf"{spec.name}: {name} must be on \w+'s device cuda:0, got cpu"):
            spec.run(given, "triton")


@pytest.mark.parametrize("channels", [8193, 9000])
def test_too_wide(channels):
    message = rf": the last dimension must be at most 8192 .* got {channels}; use backend='reference'"
    rows = [spec for spec in SPECS.values() if not spec.multiplies_matrices and spec.op != "gelu"]
    for spec in rows:
        example = next(iter(spec.examples.values()))
        forward = op_calls(spec, example(Inputs(Size(1, 2, 1, channels), device="meta")))[0]
        with record(TARGETS["sm_90"]), pytest.raises(ValueError, match=spec.op + message):
            implementation(spec.op, "triton")(*forward.args)
