"""eps = 0, and an eps below the squares that float32 holds: rows of 1e-30 are rows like any other."""

import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import sample
from tests.ops.cases import backends_here

backends = pytest.mark.parametrize("backend", [b for b in backends_here("rms_norm") if b != "reference"])
SIZES = (1e-30, 1e-22, 1e-20, 1e-16, 1.0, 1e18)


def rows_of_sizes(channels: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return (sample((len(SIZES), channels), "normal", torch.float64, generator) * torch.tensor(SIZES)[:, None]).to(dtype)


def norms(x: torch.Tensor, eps: float, backend: str | None) -> list[torch.Tensor]:
    """Every op that standardises a row; without a backend PyTorch's."""
    C, weight = x.shape[-1], torch.ones(x.shape[-1], dtype=x.dtype)
    if backend is None:
        rms = F.rms_norm(x, (C,), weight, eps)
        return [rms, F.layer_norm(x, (C,), weight, None, eps), rms, rms, rms]
    fused = ops.layer_scale_residual_norm(
        x, torch.zeros_like(x), weight, eps=eps, norm_type="rms_norm", backend=backend
    )
    heads = x[None, :, None]
    q, k = ops.qk_norm(heads, heads, weight, weight, eps=eps, backend=backend)
    return [
        ops.rms_norm(x, weight, eps=eps, backend=backend),
        ops.layer_norm(x, weight, eps=eps, backend=backend),
        fused[1],
        q.view_as(x),
        k.view_as(x),
    ]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-36, 1e-30])
@pytest.mark.parametrize("channels", [40, 1024])
def test_rows_of_any_size(backend, dtype, eps, channels, generator) -> None:
    """PyTorch's own are infinite below 1e-22 for eps = 0, where a square has no float32; the truth is finite."""
    x = rows_of_sizes(channels, dtype, generator)
    for actual, truth in zip(norms(x, eps, backend), norms(x.double(), eps, None), strict=True):
        error = (actual.double() - truth).abs().amax(1) / truth.abs().amax(1)
        assert (error <= 4 * torch.finfo(dtype).eps).all(), error


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_zeros_is_pytorchs(backend, dtype) -> None:
    x = torch.zeros(2, 40, dtype=dtype)
    for eps in (0.0, 1e-30):
        for actual, expected in zip(norms(x, eps, backend), norms(x, eps, None), strict=True):
            assert torch.equal(actual, expected) or (actual.isnan().all() and expected.isnan().all())
