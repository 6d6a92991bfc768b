import functools

import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import norm_violations, sample
from tests.ops.cases import backends_here
from tests.ops.shapes import check_gradients, in_draws, norm_shapes, pooled, three_gradients

backends = pytest.mark.parametrize("backend", backends_here("rms_norm"))


def upstream(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """InternRMSNorm: statistics in float32, cast, then the weight."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@pytest.mark.sampled(4)
@backends
@norm_shapes
def test_contract(backend, rows, width, distribution, dtype, generator) -> None:
    x = sample((pooled(rows), width), distribution, dtype, generator)
    weight = sample((width,), "normal", dtype, generator)
    truth = F.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    y = torch.cat([ops.rms_norm(part, weight, backend=backend) for part in in_draws(x, rows)])
    assert y.dtype == dtype
    assert norm_violations(y, truth, F.rms_norm(x, (width,), weight, 1e-6)) == []


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reference_rounding_is_upstreams(backend, dtype, generator) -> None:
    x = sample((257, 3200), "massive", dtype, generator)
    weight = 1 + 0.3 * sample((3200,), "normal", dtype, generator)
    y = ops.rms_norm(x, weight, rounding="reference", backend=backend)
    same = (y == upstream(x, weight, 1e-6)).double().mean().item()
    assert same > 0.999, f"{same:.2%} of the bits are upstream's"


@backends
def test_gradients_at_true_width(backend, generator) -> None:
    def draw() -> tuple:
        x = sample((2, 33, 3200), "massive", torch.float32, generator)
        weight = sample((3200,), "normal", torch.float32, generator)
        grad = sample((2, 33, 3200), "normal", torch.float32, generator)
        op = functools.partial(ops.rms_norm, backend=backend)
        return three_gradients(op, lambda x, a: F.rms_norm(x, (3200,), a, 1e-6), (x, weight), grad)

    check_gradients(draw)


@backends
def test_float32_weight_beside_16_bit_activations(backend, generator) -> None:
    x = sample((3, 384), "normal", torch.bfloat16, generator)
    weight = sample((384,), "normal", torch.float32, generator)
    y = ops.rms_norm(x, weight, backend=backend)
    assert y.dtype == torch.bfloat16
    assert norm_violations(y, F.rms_norm(x.double(), (384,), weight.double(), 1e-6)) == []


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finite_up_to_1e18(backend, dtype) -> None:
    x = torch.full((2, 3200), 1e18, dtype=dtype)
    assert ops.rms_norm(x, torch.ones(3200, dtype=dtype), backend=backend).isfinite().all()


@backends
def test_any_leading_shape(backend, generator) -> None:
    x = sample((2, 3, 5, 40), "normal", torch.float32, generator)
    weight = sample((40,), "normal", torch.float32, generator)
    whole = ops.rms_norm(x, weight, backend=backend)
    assert torch.equal(whole[1, 2, 3], ops.rms_norm(x[1, 2, 3], weight, backend=backend))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(7)), r"weight must have shape \[8\] \(x's last dimension\), got \[7\]"),
        (
            dict(x=torch.ones(2, 8, dtype=torch.int32)),
            "x must be float32, bfloat16, float16 or float64, got torch.int32",
        ),
        (dict(x=torch.tensor(1.0)), r"x must have a last dimension of at least 1, got shape \[\]"),
        (dict(weight=torch.ones(8, device="meta")), "weight must be on x's device cpu, got meta"),
        (dict(eps=-1.0), "eps must be a number >= 0, got -1.0"),
        (dict(rounding="exact"), "rounding must be one of 'fused', 'reference', got 'exact'"),
        (dict(backend="cudnn"), "expected one of auto, reference, .* got 'cudnn'"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(**{"x": torch.ones(2, 8), "weight": torch.ones(8), **change})
