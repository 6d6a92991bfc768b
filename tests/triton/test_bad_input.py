"""What the triton backend cannot take is refused by name, with the way out."""

import os

import pytest
import torch

from internvit.ops import attention, layer_scale_residual, rms_norm

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


@pytest.mark.parametrize(("head_dim", "got"), [(12, "got 12"), (136, "got 136")])
def test_head_dimensions(head_dim, got):
    q = on_cuda(1, 5, 2, head_dim)
    with pytest.raises(ValueError, match=r"attention: .* head dimension that is a multiple of 8 up to 128, " + got):
        attention(q, q, q, backend="triton")


def test_float64():
    with pytest.raises(ValueError, match=r"rms_norm: .* float32, bfloat16, float16, got torch.float64"):
        rms_norm(on_cuda(2, 8, dtype=torch.float64), on_cuda(8, dtype=torch.float64), backend="triton")


def test_mixed_devices():
    with pytest.raises(ValueError, match=r"branch must be on residual's device cuda:0, got cpu"):
        layer_scale_residual(on_cuda(2, 3, 8), torch.empty(2, 3, 8, dtype=torch.bfloat16), backend="triton")


def test_too_wide():
    from internvit.kernels.launch import TARGETS
    from internvit.kernels.rows import row_launch

    with pytest.raises(ValueError, match=r"rms_norm: the last dimension must be at most 8192 .* got 9000; use backend"):
        row_launch("rms_norm", 9000, TARGETS["sm_90"])
