import pytest
import torch

from internvit import ops
from internvit.numerics import norm_violations, relative_error, sample
from tests.ops.cases import backends_here
from tests.ops.shapes import norm_shapes

backends = pytest.mark.parametrize("backend", backends_here("layer_scale_residual"))


@pytest.mark.sampled(8)
@backends
@norm_shapes
def test_contract(backend, rows, width, distribution, dtype, generator) -> None:
    residual = sample((2, rows, width), distribution, dtype, generator)
    branch = sample((2, rows, width), "normal", dtype, generator)
    gamma = sample((width,), "normal", dtype, generator)
    row_scale = torch.tensor([0.0, 1.25])
    truth = residual.double() + row_scale.double().view(-1, 1, 1) * gamma.double() * branch.double()
    out = ops.layer_scale_residual(residual, branch, gamma, row_scale, backend=backend)
    eager = residual + row_scale.view(-1, 1, 1).to(dtype) * gamma * branch
    magnitude = residual.double().abs() + (truth - residual).abs()
    assert norm_violations(out, truth, eager, magnitude) == []
    assert torch.equal(out[0], residual[0])


@backends
def test_float32_residual_beside_a_16_bit_branch(backend, generator) -> None:
    residual = sample((2, 3, 40), "normal", torch.float32, generator).requires_grad_()
    branch = sample((2, 3, 40), "normal", torch.bfloat16, generator).requires_grad_()
    gamma = sample((40,), "normal", torch.float32, generator).requires_grad_()
    out = ops.layer_scale_residual(residual, branch, gamma, backend=backend)
    assert out.dtype == torch.float32
    truth = residual.double() + gamma.double() * branch.double()
    assert relative_error(out, truth) < 1e-6
    out.sum().backward()
    assert (residual.grad.dtype, branch.grad.dtype, gamma.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert relative_error(gamma.grad, branch.detach().double().sum((0, 1))) < 1e-6


@backends
def test_folded_layer_scale(backend, generator) -> None:
    residual, branch = (sample((2, 3, 40), "normal", torch.float32, generator) for _ in range(2))
    assert torch.equal(ops.layer_scale_residual(residual, branch, backend=backend), residual + branch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(branch=torch.ones(2, 3, 7)), r"branch must have residual's shape \[2, 3, 8\], got \[2, 3, 7\]"),
        (dict(gamma=torch.ones(3)), r"gamma must have shape \[8\]"),
        (
            dict(row_scale=torch.ones(3)),
            r"row_scale must have shape \[2\] \(one factor per image of residual\), got \[3\]",
        ),
        (dict(row_scale=torch.ones(2, requires_grad=True)), "row_scale is a random factor and gets no gradient"),
        (dict(residual=torch.ones(2, 3, 8).bfloat16()), "residual must have branch's dtype torch.float32 or be"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.layer_scale_residual(**{"residual": torch.ones(2, 3, 8), "branch": torch.ones(2, 3, 8), **change})
