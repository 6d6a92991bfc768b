"""layer_scale_residual and layer_scale_residual_norm, forward and backward, against float64."""

import pytest
import torch

from internvit import numerics
from internvit.ops import layer_norm, layer_scale_residual, layer_scale_residual_norm, rms_norm
from internvit.ops.layer_scale_residual import factor
from tests.proofs.triton.interpreted.harness import (
    CHANNELS,
    DTYPES,
    STRIDES,
    Memory,
    addends,
    agree,
    check_statistics,
    fits,
    generator,
    parametrize,
    reference,
    run,
)
from tests.support.implementations import call

FACTORS = {
    "op": ("layer_scale_residual", "rms_norm", "layer_norm"),
    "tokens": (1, 3, 257, 1025),
    "channels": CHANNELS,
    "dtype": DTYPES,
    "distribution": numerics.DISTRIBUTIONS,
    "strides": STRIDES,
    "residual": ("same", "float32"),
    "gamma": ("same", "float32", "none"),
    "row_scale": ("zeros", "none"),
    "grad": ("both", "normed"),
}


@parametrize(full=("op", "tokens", "channels", "dtype", "distribution"), allowed=fits, **FACTORS)
def test_residual(case):
    g, memory = generator(case), Memory()
    dtype = getattr(torch, case["dtype"])
    batch = 1 if case["tokens"] == 1025 else 2
    C = case["channels"]
    shape = (batch, case["tokens"], C)

    def tensor(distribution, dtype):
        # halved: a residual at float16's limit plus a branch would overflow in any arithmetic
        return memory.place((0.5 * numerics.sample(shape, distribution, dtype, g)).to(dtype), case["strides"])

    residual = tensor(case["distribution"], torch.float32 if case["residual"] == "float32" else dtype)
    branch = tensor("normal", dtype)
    parameter = torch.float32 if case["gamma"] == "float32" else dtype
    gamma = None if case["gamma"] == "none" else memory.place(torch.randn(C, generator=g).to(parameter))
    row_scale = None if case["row_scale"] == "none" else memory.place(torch.tensor([0.0, 1.25]))[-batch:]
    if row_scale is not None and case["tokens"] == 1:
        row_scale = row_scale.flip(0)

    terms = residual.double().abs() + (factor(branch.double(), gamma, row_scale)).abs()
    if case["op"] == "layer_scale_residual":
        inputs = (residual, branch, gamma, row_scale)
        actual, truth, eager = outputs(memory, "layer_scale_residual", *inputs)
        agree("norm", "residual_out", actual, truth, eager, terms, roundings=2)
        grad = tensor("normal", residual.dtype)
        inputs = (grad, branch, gamma, row_scale, dtype, (True, gamma is not None))
        actual, truth, eager = outputs(memory, "layer_scale_residual_backward", *inputs)
        agree("norm", "grad_branch", actual[:1], truth[:1], eager[:1])
        agree("sum", "grad_gamma", actual[1:], truth[1:], eager[1:], addends=addends(batch * case["tokens"], C))
        return

    kind = case["op"]
    weight, bias = (memory.place(torch.randn(C, generator=g).to(parameter)) for _ in range(2))
    inputs = (residual, branch, gamma, row_scale, weight, bias if kind == "layer_norm" else None, 1e-6, kind, "fused")
    op = "layer_scale_residual_norm"
    actual = run(memory, op, *inputs)
    summed = reference("layer_scale_residual", torch.float64, *inputs[:4])
    eager = reference("layer_scale_residual", torch.float32, *inputs[:4])
    agree("norm", "residual_out", actual[:1], summed, eager, terms, roundings=2)
    # the norm's truth starts from residual_out as it was rounded, which may be one ulp from the correctly rounded sum
    norm_inputs = (actual[0], *inputs[4:6], 1e-6) if kind == "layer_norm" else (actual[0], weight, 1e-6, "fused")
    truth, eager = (reference(kind, d, *norm_inputs) for d in (torch.float64, torch.float32))
    terms = numerics.layer_norm_terms(actual[0], weight, bias) if kind == "layer_norm" else None
    agree("norm", "normed", actual[1:2], truth[:1], eager[:1], terms)
    statistics = actual[2:] if kind == "layer_norm" else actual[3:]
    check_statistics(statistics, truth[1:])

    grad_residual = None if case["grad"] == "normed" else tensor("normal", residual.dtype)
    mask = (True, True, gamma is not None, True, kind == "layer_norm")
    given = (grad_residual, tensor("normal", dtype), actual[0], branch, gamma, row_scale, weight)
    mean = truth[1] if kind == "layer_norm" else actual[2]
    grads = run(memory, f"{op}_backward", *given, *actual[2:], kind, mask)  # its own statistics
    truth_grads, eager_grads = (
        reference(f"{op}_backward", d, *given, mean.to(d), truth[-1].to(d), kind, mask)
        for d in (torch.float64, torch.float32)
    )
    names = "grad_residual grad_branch grad_gamma grad_weight grad_bias"
    agree("sum", names, grads, truth_grads, eager_grads, addends=addends(batch * case["tokens"], C))


def outputs(memory, op, *inputs):
    return run(memory, op, *inputs), *(reference(op, d, *inputs) for d in (torch.float64, torch.float32))


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("rounding", ["fused", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_pass_equals_two(kind, rounding, dtype):
    g, dtype = torch.Generator().manual_seed(3), getattr(torch, dtype)
    residual, branch = (numerics.sample((2, 5, 384), d, dtype, g) for d in ("massive", "normal"))
    gamma, weight = (torch.randn(384, generator=g).to(dtype) for _ in range(2))
    row_scale = torch.tensor([0.0, 1.25])
    summed, normed = layer_scale_residual_norm(
        *(residual, branch, weight, None, gamma, row_scale), norm_type=kind, rounding=rounding, backend="triton"
    )
    expected = layer_scale_residual(residual, branch, gamma, row_scale, backend="triton")
    assert torch.equal(summed, expected)
    if kind == "rms_norm":
        assert torch.equal(normed, rms_norm(expected, weight, rounding=rounding, backend="triton"))
    else:
        assert torch.equal(normed, layer_norm(expected, weight, backend="triton"))


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", ["same", "float32"])
def test_one_pass_backward_equals_two(kind, residual_dtype, dtype, generator):
    """Of a float32 stream to the bit. A 16-bit stream's gradient is rounded once, where two ops round it three times:
    it has the bits of two ops that are given the same numbers in float32."""
    dtype = getattr(torch, dtype)
    grad_out, x = (numerics.sample((2, 5, 384), d, dtype, generator) for d in ("normal", "massive"))
    if residual_dtype == "float32":
        grad_out, x = grad_out.float(), x.float()
    grad_normed, branch = (numerics.sample(x.shape, "normal", dtype, generator) for _ in range(2))
    gamma, weight = (torch.randn(384, generator=generator).to(dtype) for _ in range(2))
    row_scale, is_layer_norm = torch.tensor([0.0, 1.25]), kind == "layer_norm"
    statistics = call(kind, "triton", x, weight, *([None, 1e-6] if is_layer_norm else [1e-6, "fused"]))[1:]
    mean = statistics[0] if is_layer_norm else torch.empty(0)
    given = (branch, gamma, row_scale)
    fused = call(
        *("layer_scale_residual_norm_backward", "triton", grad_out, grad_normed, x, *given, weight, mean),
        *(statistics[-1], kind, [True] * 4 + [is_layer_norm]),
    )
    grad_x, *of_norm = call(
        f"{kind}_backward", "triton", grad_normed.float(), x.float(), weight, *statistics, [True] * (2 + is_layer_norm)
    )
    grad = grad_x + grad_out.float()
    of_residual = call("layer_scale_residual_backward", "triton", grad, *given, dtype, [True, True])
    for a, b in zip(fused, [grad.to(x.dtype), *of_residual, *of_norm], strict=False):
        assert torch.equal(a, b)


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2, 4)])
def test_gradients_only_where_asked(asked):
    g = torch.Generator().manual_seed(4)
    inputs = [torch.randn(2, 3, 40, generator=g) for _ in range(2)] + list(torch.randn(3, 40, generator=g))
    row_scale, results = torch.tensor([0.0, 2.0]), []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_(i in asked) for i, t in enumerate(inputs)]
        residual, branch, gamma, weight, bias = leaves
        out, normed = layer_scale_residual_norm(
            *(residual, branch, weight, bias, gamma, row_scale), norm_type="layer_norm", backend=backend
        )
        wanted = [t for t in leaves if t.requires_grad]
        results.append(torch.autograd.grad(out.square().sum() + normed.cos().sum(), wanted))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,), (2, 3, 2, 40)])
def test_any_leading_shape(shape):
    residual, branch, weight = torch.randn(shape), torch.randn(shape), torch.randn(40)
    for op, args in ((layer_scale_residual, (None, None)), (layer_scale_residual_norm, (weight,))):
        results = [op(residual, branch, *args, backend=b) for b in ("triton", "reference")]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
