import functools

import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import layer_norm_terms, norm_violations, relative_error, sample
from tests.ops.cases import backends_here
from tests.ops.shapes import check_gradients, in_draws, mean_over_std, norm_shapes, pooled, three_gradients

backends = pytest.mark.parametrize("backend", backends_here("layer_norm"))


@pytest.mark.sampled(4)
@backends
@norm_shapes
def test_contract(backend, rows, width, distribution, dtype, generator) -> None:
    x = sample((pooled(rows), width), distribution, dtype, generator)
    weight, bias = (sample((width,), "normal", dtype, generator) for _ in range(2))
    truth = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6)
    y = torch.cat([ops.layer_norm(part, weight, bias, backend=backend) for part in in_draws(x, rows)])
    assert y.dtype == dtype
    eager = F.layer_norm(x, (width,), weight, bias, 1e-6)
    assert norm_violations(y, truth, eager, layer_norm_terms(x, weight, bias), mean_over_std(x)) == []


@backends
@pytest.mark.parametrize("distribution", ["normal", "massive"])
def test_errors_are_roundings_of_the_terms(backend, distribution, generator) -> None:
    """Without a bias elements next to the mean have only the mean's error, which is one of the whole row: up to 3000
    roundings of (|x| + |mean|) * rstd * |weight|, up to 7 of `layer_norm_terms`."""
    x = sample((256, 1024), distribution, torch.bfloat16, generator).float()
    weight, bias = sample((1024,), "normal", torch.float32, generator), torch.zeros(1024)
    truth = F.layer_norm(x.double(), (1024,), weight.double(), None, 1e-6)
    error = (ops.layer_norm(x, weight, backend=backend).double() - truth).abs()
    assert (error <= 12 * torch.finfo(torch.float32).eps * layer_norm_terms(x, weight, bias)).all()


@backends
def test_gradients_at_true_width(backend, generator) -> None:
    def draw() -> tuple:
        x = sample((2, 33, 1024), "massive", torch.float32, generator)
        weight, bias = (sample((1024,), "normal", torch.float32, generator) for _ in range(2))
        grad = sample((2, 33, 1024), "normal", torch.float32, generator)
        op = functools.partial(ops.layer_norm, backend=backend)
        return three_gradients(op, lambda x, *ab: F.layer_norm(x, (1024,), *ab, 1e-6), (x, weight, bias), grad)

    check_gradients(draw)


@backends
def test_without_bias(backend, generator) -> None:
    x = sample((3, 40), "normal", torch.float32, generator)
    weight = sample((40,), "normal", torch.float32, generator)
    truth = F.layer_norm(x.double(), (40,), weight.double(), None, 1e-6)
    assert relative_error(ops.layer_norm(x, weight, backend=backend), truth) < 3e-7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bias=torch.ones(7)), r"bias must have shape \[8\] \(x's last dimension\), got \[7\]"),
        (dict(bias=torch.ones(8).bfloat16()), "bias must have weight's dtype torch.float32, got torch.bfloat16"),
        (dict(x=torch.ones(2, 0), weight=torch.ones(0)), "x must have a last dimension of at least 1"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.layer_norm(**{"x": torch.ones(2, 8), "weight": torch.ones(8), **change})
