"""Offsets beyond 2^31 elements: rows far apart in memory that is reserved but never touched in between."""

import pytest
import torch

from internvit.ops import attention, layer_scale_residual, linear_gelu, qk_norm, rms_norm

STRIDE = 2**30  # fits int32; two of them do not


@pytest.fixture(scope="module")
def storage():
    """4 GiB of address space in bfloat16 and as much before it, of which a few pages are used: an offset that wraps
    around reads zeros there and does not kill the process."""
    return torch.empty(4 * STRIDE + 4096, dtype=torch.bfloat16)


def far(storage, shape, strides):
    return storage.as_strided(shape, strides, 2 * STRIDE)


def test_rows_far_apart(storage):
    x = far(storage, (3, 40), (STRIDE, 1)).copy_(torch.randn(3, 40))
    weight = torch.randn(40).bfloat16().requires_grad_()
    for op in (
        lambda x, backend: rms_norm(x, weight, backend=backend),
        lambda x, backend: layer_scale_residual(x, x, weight, backend=backend),
    ):
        results = []
        for backend in ("triton", "reference"):
            y = op(x, backend)
            results += [y, *torch.autograd.grad(y.float().sum(), weight)]
        torch.testing.assert_close(results[0], results[2], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(results[1], results[3], rtol=1e-2, atol=1e-2)


def test_tokens_and_images_far_apart(storage):
    weight = torch.randn(32).bfloat16()
    for strides in ((STRIDE, 32, 16, 1), (32, 2**23, 16, 1)):  # images apart; tokens apart, 257 of them
        shape = (3, 2, 2, 16) if strides[0] == STRIDE else (1, 257, 2, 16)
        q = far(storage, shape, strides).copy_(torch.randn(shape))
        for a, b in zip(*(qk_norm(q, q, weight, weight, backend=n) for n in ("triton", "reference")), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(
            *(attention(q, q, q, backend=n) for n in ("triton", "reference")), rtol=2e-2, atol=2e-2
        )


@pytest.mark.parametrize(("rows", "stride"), [(3, STRIDE), (130, 2**23)])
def test_gemm_rows_far_apart(storage, rows, stride):
    """Farther than int32 reaches inside a tile, and between tiles."""
    x = far(storage, (rows, 40), (stride, 1)).copy_(torch.randn(rows, 40))
    weight = torch.randn(24, 40).bfloat16()
    results = (linear_gelu(x, weight, backend=n) for n in ("triton_gemm", "reference"))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
