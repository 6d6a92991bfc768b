"""linear_gelu's kernels, forward and backward, against float64."""

import pytest
import torch

from internvit import numerics
from internvit.kernels.gelu import gelu, gelu_backward
from internvit.ops import linear_gelu
from internvit.ops.linear import linear
from tests.proofs.triton.interpreted.harness import DTYPES, Memory, agree, generator, parametrize, reference, run


@parametrize(
    full=("rows", "channels", "dtype", "distribution", "strides"),
    rows=(1, 3, 257),
    channels=(40, 96, 384),
    dtype=DTYPES,
    distribution=("normal", "near_zero", "massive"),
    strides=("contiguous", "packed", "transposed"),
)
def test_gelu(case):
    g, memory = generator(case), Memory()
    dtype = getattr(torch, case["dtype"])
    shape = (case["rows"], case["channels"])
    z = memory.place(numerics.sample(shape, case["distribution"], dtype, g), case["strides"])
    grad = memory.place(numerics.sample(shape, "normal", dtype, g), case["strides"])
    for op, inputs in (("gelu", (z,)), ("gelu_backward", (grad, z))):
        actual = run(memory, op, *inputs)
        truth, eager = (reference(op, d, *inputs) for d in (torch.float64, torch.float32))
        agree("sum", op, actual, truth, eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_gelu(dtype):
    g, memory, dtype = torch.Generator().manual_seed(5), Memory(), getattr(torch, dtype)
    x, weight = (torch.randn(s, generator=g).to(dtype) for s in ((2, 9, 64), (96, 64)))
    bias = torch.randn(96, generator=g).to(dtype)
    y, pre_activation = run(memory, "linear_gelu", x, weight, bias, True)
    assert torch.equal(pre_activation, linear(x, weight, bias))
    assert torch.equal(y, run(memory, "gelu", pre_activation)[0]), "recomputing must give the same bits"


def test_gradients_and_no_rows():
    g = torch.Generator().manual_seed(6)
    for rows in (0, 5):
        inputs = [torch.randn(s, generator=g) for s in ((rows, 16), (24, 16), (24,))]
        results = []
        for backend in ("triton", "reference"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            results.append(torch.autograd.grad(linear_gelu(*leaves, backend=backend).square().sum(), leaves))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_cdf_everywhere():
    """Where the two polynomials meet, both tails, infinity and NaN; float32, where nothing hides an error."""
    z = torch.cat([torch.linspace(-14, 14, 8001), torch.linspace(1.418, 1.419, 101), torch.tensor([1e4, 1e30, -1e30])])
    wide = z.double()
    cdf = torch.special.erfc(-wide * 0.5**0.5) / 2
    density = (-wide.square() / 2).exp() / (2 * torch.pi) ** 0.5
    eps = torch.finfo(torch.float32).eps
    error = (gelu(z).double() - wide * cdf).abs()
    # 6e-4 at -5 and 6e-6 at -4 of the tail itself, which is 3e-7 and 3e-5
    assert (error <= wide.abs() * (2 * eps * cdf + 4e-10 + 1e-6 * cdf.clamp_max(0.06))).all()
    slope = (gelu_backward(torch.ones_like(z), z).double() - (cdf + wide * density)).abs()
    assert (slope[:-2] <= 4 * eps).all()
    ends = torch.tensor([float("inf"), float("nan"), 0.0])
    assert torch.equal(gelu(ends).nan_to_num(7, 8), torch.tensor([8.0, 7.0, 0.0]))
