import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import product_violations, relative_error, sample
from internvit.ops.gelu import gelu
from internvit.ops.linear_gelu import linear_gelu_with_pre_activation
from tests.ops.cases import backends_here
from tests.ops.shapes import in_draws, pooled

backends = pytest.mark.parametrize("backend", backends_here("linear_gelu"))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.mark.sampled(2)
@backends
@dtypes
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 40, 24), (257, 384, 1536), (65, 1024, 4096)])
def test_contract(backend, dtype, rows, width, out, generator) -> None:
    x = sample((2, pooled(rows), width), "normal", dtype, generator)
    weight, bias = sample((out, width), "normal", dtype, generator) / 8, sample((out,), "normal", dtype, generator)
    y = torch.cat([ops.linear_gelu(part, weight, bias, backend=backend) for part in in_draws(x, rows, 1)], 1)
    pre = F.linear(x.double(), weight.double(), bias.double())
    truth = F.gelu(pre)
    eager = F.gelu(F.linear(x, weight, bias))
    emulation = eager if dtype == torch.float32 else F.gelu(pre.to(dtype).double()).to(dtype)
    assert product_violations(y, truth, emulation) == []


@backends
@dtypes
def test_gelu_is_rebuilt_to_the_bit(backend, dtype, generator) -> None:
    x, weight = sample((3, 40), "normal", dtype, generator), sample((64, 40), "normal", dtype, generator)
    y, pre, name = linear_gelu_with_pre_activation(x, weight, None, backend=backend)
    assert torch.equal(gelu(pre, backend=name), y)


@backends
def test_gradients(backend, generator) -> None:
    x = sample((2, 17, 384), "normal", torch.float32, generator).requires_grad_()
    weight = (sample((256, 384), "normal", torch.float32, generator) / 16).requires_grad_()
    bias = sample((256,), "normal", torch.float32, generator).requires_grad_()
    grad = sample((2, 17, 256), "normal", torch.float32, generator)
    actual = torch.autograd.grad(ops.linear_gelu(x, weight, bias, backend=backend), (x, weight, bias), grad)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    truth = torch.autograd.grad(F.gelu(F.linear(*wide)), wide, grad.double())
    for a, t in zip(actual, truth, strict=True):
        assert relative_error(a, t) < 2e-6


@backends
def test_autocast_casts_as_a_linear_does(backend, generator) -> None:
    x = sample((3, 40), "normal", torch.float32, generator).requires_grad_()
    weight = sample((24, 40), "normal", torch.float32, generator).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear_gelu(x, weight, backend=backend)
        assert y.dtype == F.linear(x, weight).dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(4, 7)), r"weight must have shape \[M, 8\] \(x's last dimension\), got \[4, 7\]"),
        (dict(bias=torch.ones(5)), r"bias must have shape \[4\] \(weight's rows\), got \[5\]"),
        (dict(weight=torch.ones(4, 8).double()), "weight must have x's dtype torch.float32, got torch.float64"),
    ],
)
def test_bad_input(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear_gelu(**{"x": torch.ones(2, 8), "weight": torch.ones(4, 8), **change})
