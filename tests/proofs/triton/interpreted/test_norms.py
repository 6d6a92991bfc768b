"""rms_norm and layer_norm, forward and backward, in the interpreter against float64."""

import pytest
import torch

from internvit import numerics
from internvit.ops import layer_norm, rms_norm
from tests.proofs.triton.interpreted.harness import (
    CHANNELS,
    DTYPES,
    ROWS,
    STRIDES,
    Memory,
    addends,
    agree,
    check_statistics,
    generator,
    parametrize,
    reference,
    run,
)

FACTORS = {
    "op": ("rms_norm", "layer_norm"),
    "rows": ROWS,
    "channels": CHANNELS,
    "dtype": DTYPES,
    "distribution": numerics.DISTRIBUTIONS,
    "strides": STRIDES,
    "parameters": ("same", "float32"),
}


@parametrize(full=("op", "rows", "channels", "dtype", "distribution"), **FACTORS)
def test_norm(case):
    g, memory = generator(case), Memory()
    dtype = getattr(torch, case["dtype"])
    parameter_dtype = torch.float32 if case["parameters"] == "float32" else dtype
    shape = (1, case["rows"], case["channels"])
    x = memory.place(numerics.sample(shape, case["distribution"], dtype, g), case["strides"])
    grad_y = memory.place(numerics.sample(shape, "normal", dtype, g), case["strides"])
    weight, bias = (
        memory.place((1 + torch.randn(case["channels"], generator=g)).to(parameter_dtype)) for _ in range(2)
    )
    inputs = (x, weight, 1e-6, "fused") if case["op"] == "rms_norm" else (x, weight, bias, 1e-6)
    actual = run(memory, case["op"], *inputs)
    truth, eager = (reference(case["op"], d, *inputs) for d in (torch.float64, torch.float32))
    terms = numerics.layer_norm_terms(x, weight, bias) if case["op"] == "layer_norm" else None
    agree("norm", "y", actual[:1], truth[:1], eager[:1], terms)
    check_statistics(actual[1:], truth[1:])

    mask = (True,) * (2 if case["op"] == "rms_norm" else 3)
    actual = run(memory, f"{case['op']}_backward", grad_y, x, weight, *actual[1:], mask)  # its own statistics
    truth = reference(f"{case['op']}_backward", torch.float64, grad_y, x, weight, *truth[1:], mask)
    eager = reference(f"{case['op']}_backward", torch.float32, grad_y, x, weight, *eager[1:], mask)
    names = " ".join(("grad_x", "grad_weight", "grad_bias")[: len(mask)])
    agree("sum", names, actual, truth, eager, addends=addends(case["rows"], case["channels"]))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_reference_rounding_is_upstreams(dtype):
    g = torch.Generator().manual_seed(1)
    x = numerics.sample((3, 5, 384), "massive", getattr(torch, dtype), g)
    weight = torch.randn(384, generator=g).to(x.dtype)
    actual = rms_norm(x, weight, rounding="reference", backend="triton")
    expected = rms_norm(x, weight, rounding="reference", backend="reference")
    equal = (actual == expected).double().mean().item()
    assert equal > 0.999, f"{equal:.2%} equal"


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (1,), (2, 3, 2, 40)])
def test_any_leading_shape_and_gradients(shape):
    g = torch.Generator().manual_seed(2)
    for op, parameters in ((rms_norm, 1), (layer_norm, 2)):
        inputs = [torch.randn(shape, generator=g), *torch.randn(2, shape[-1], generator=g)[:parameters]]
        results = []
        for backend in ("triton", "reference"):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = op(*leaves, backend=backend)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", [rms_norm, layer_norm])
def test_frozen_inputs_get_no_gradient(op):
    x, weight = torch.randn(3, 40), torch.randn(40)
    for leaf, frozen in ((x, weight), (weight, x)):
        leaf, frozen = leaf.clone().requires_grad_(), frozen.clone()
        args = (leaf, frozen) if leaf.dim() == 2 else (frozen, leaf)
        grads = []
        for backend in ("triton", "reference"):
            grads += torch.autograd.grad(op(*args, backend=backend).square().sum(), leaf)
        torch.testing.assert_close(*grads)


def test_same_bits_alone_and_in_a_batch_and_again():
    x, weight = torch.randn(5, 7, 1024).bfloat16(), torch.randn(1024).bfloat16()
    batch = rms_norm(x, weight, backend="triton")
    assert torch.equal(batch, rms_norm(x, weight, backend="triton"))
    for i in range(5):
        assert torch.equal(batch[i], rms_norm(x[i], weight, backend="triton"))


def test_finite_up_to_1e18():
    x = torch.full((2, 3200), 1e18).bfloat16()
    for y in (rms_norm(x, torch.ones(3200), backend="triton"), layer_norm(x, torch.ones(3200), backend="triton")):
        assert y.isfinite().all()
    assert torch.equal(rms_norm(x, torch.ones(3200), backend="triton"), torch.ones_like(x))


def test_too_wide_names_the_way_out():
    with pytest.raises(ValueError, match=r"rms_norm: .* at most 8192 channels, got 8193; use backend"):
        rms_norm(torch.zeros(1, 8193), torch.zeros(8193), backend="triton")
