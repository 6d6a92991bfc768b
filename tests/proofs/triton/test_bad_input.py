"""What the triton backend cannot take is refused by name, with the way out."""

import os

import pytest
import torch

from internvit.ops import (
    attention,
    layer_norm,
    layer_scale_residual,
    layer_scale_residual_norm,
    linear_gelu,
    qk_norm,
    qk_norm_attention,
    qk_norm_stats,
    rms_norm,
)

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


def calls(make):
    """op -> (the call with backend triton, its arguments by name); `make` builds a tensor of a shape."""
    rows, vector, head = (2, 3, 16), (16,), (2, 3, 2, 8)
    shapes = {
        rms_norm: {"x": rows, "weight": vector},
        layer_norm: {"x": rows, "weight": vector, "bias": vector},
        layer_scale_residual: {"residual": rows, "branch": rows, "gamma": vector, "row_scale": (2,)},
        layer_scale_residual_norm: {
            **{"residual": rows, "branch": rows, "gamma": vector, "row_scale": (2,), "weight": vector, "bias": vector},
        },
        qk_norm_stats: {"q": head, "k": head},
        qk_norm: {"q": head, "k": head, "q_weight": vector, "k_weight": vector},
        attention: {"q": head, "k": head, "v": head},
        qk_norm_attention: {"q": head, "k": head, "v": head, "q_weight": vector, "k_weight": vector},
        linear_gelu: {"x": rows, "weight": (32, 16), "bias": (32,)},
    }
    return {op: {name: make(*shape) for name, shape in arguments.items()} for op, arguments in shapes.items()}


def call(op, arguments):
    options = {"norm_type": "layer_norm"} if op is layer_scale_residual_norm else {}
    return op(**arguments, **options, backend="triton")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("op", calls(lambda *shape: None), ids=lambda op: op.__name__)
def test_every_op_refuses_cpu_tensors_and_float64(op):
    for make, got in (
        (torch.empty, "it runs on GPU tensors .* got cpu"),
        (lambda *shape: on_cuda(*shape, dtype=torch.float64), "it takes float32, bfloat16, float16, got torch.float64"),
    ):
        message = rf"^{op.__name__}: backend 'triton' cannot take this input: {got}; use backend='reference', or 'auto'"
        with pytest.raises(ValueError, match=message):
            call(op, calls(make)[op])


@pytest.mark.parametrize("op", calls(lambda *shape: None), ids=lambda op: op.__name__)
def test_every_argument_on_another_device_is_named(op):
    names = list(calls(on_cuda)[op])
    for name in names[1:]:
        arguments = calls(on_cuda)[op]
        arguments[name] = torch.empty(arguments[name].shape, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=rf"{op.__name__}: {name} must be on \w+'s device cuda:0, got cpu"):
            call(op, arguments)


@pytest.mark.parametrize("channels", [8193, 9000])
def test_too_wide(channels):
    from internvit.kernels.common.launch import record
    from internvit.kernels.common.target import TARGETS
    from internvit.ops.backends.registry import implementation

    x, w = (torch.empty(s, device="meta") for s in ((2, channels), (channels,)))
    message = rf": the last dimension must be at most 8192 .* got {channels}; use backend='reference'"
    for op, arguments in (
        ("rms_norm", (x, w, 1e-6, "fused")),
        ("layer_norm", (x, w, w, 1e-6)),
        ("layer_scale_residual", (x, x, w, None)),
        ("layer_scale_residual_norm", (x, x, w, None, w, None, 1e-6, "rms_norm", "fused")),
        ("qk_norm_stats", (x.view(1, 2, 1, -1), x.view(1, 2, 1, -1), 1e-6)),
        ("qk_norm", (x.view(1, 2, 1, -1), x.view(1, 2, 1, -1), w, w, 1e-6, "fused")),
    ):
        with record(TARGETS["sm_90"]), pytest.raises(ValueError, match=op + message):
            implementation(op, "triton")(*arguments)
