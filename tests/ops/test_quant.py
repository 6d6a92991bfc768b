"""Rows in int8 and float8: the nearest values, and the bits of a norm in float32 followed by `per_token_quant`."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import DISTRIBUTIONS, layer_norm_terms, relative_error, sample
from internvit.ops.backends.registry import backends_for
from internvit.ops.core import quant_math
from tests.ops.test_inference_ops import bits, equal

BACKENDS = backends_for("per_token_quant", "cpu", torch.float32)
E4M3 = torch.float8_e4m3fn
SETTINGS = ({}, {"symmetric": False}, {"dtype": E4M3})
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=["int8", "int8-asymmetric", "float8"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@each_backend
@each_dtype
@each_setting
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_quantised_rows(distribution: str, dtype, setting: dict, backend: str, generator) -> None:
    for width in (3, 17, 64, 200):
        check_rows(distribution, dtype, width, setting, backend, generator)


def check_rows(distribution: str, dtype, width: int, setting: dict, backend: str, generator) -> None:
    x = sample((3, 5, width), distribution, dtype, generator)
    x[0, 0] = 0
    x[0, 1] = F.gelu(x[0, 1])
    outputs = ops.per_token_quant(x, **setting, backend=backend)
    assert equal(outputs, ops.per_token_quant(x, **setting, backend="reference"))
    x_q, x_scale, x_zero = outputs
    assert not bits(x_q[0, 0]).any()
    assert x_scale[0, 0] == x_zero[0, 0] == 0
    symmetric = setting.get("symmetric", True)
    if symmetric:
        assert not x_zero.any()
        assert (x_q[1:].float().abs().amax(-1) == quant_math.STEPS[x_q.dtype]).all()
    else:
        assert x_zero.abs().max() <= 128
        assert (x_q[1:].amax(-1) - x_q[1:].amin(-1).int() <= 255).all()
    assert not quant_math.violations(outputs, x.double(), symmetric)


@each_backend
def test_a_zero_point_doubles_the_resolution_of_a_gelus_output(backend: str, generator) -> None:
    x, errors = F.gelu(sample((50, 400), "normal", torch.float32, generator)), []
    for symmetric in (True, False):
        outputs = ops.per_token_quant(x, symmetric=symmetric, backend=backend)
        errors.append(relative_error(quant_math.restored(*outputs), x))
    assert errors[1] < 0.6 * errors[0]


@each_backend
def test_ties_go_to_even_and_the_sign_is_kept(backend: str) -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5])
    x_q, x_scale, _ = ops.per_token_quant(x, backend=backend)
    assert x_q.tolist() == [127, 0, 2, 2, 0, -2, -127, 126]
    assert x_scale.item() == 1.0


@each_backend
def test_every_float8_value_and_what_lies_between(backend: str) -> None:
    """Values, midpoints of neighbours, which go to the even one, and what is just off them."""
    values = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)]).float()
    x = torch.cat([x, -x])
    x_q, x_scale, _ = ops.per_token_quant(x, dtype=E4M3, backend=backend)
    assert x_scale.item() == 1.0
    evens = torch.where(torch.arange(126) % 2 == 0, values[:-1], values[1:])
    expected = torch.cat([values, evens, values[1:], values[:-1]])
    assert torch.equal(x_q.double(), torch.cat([expected, -expected]))


@each_backend
@each_setting
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad: float, setting: dict, backend: str, generator) -> None:
    for column in (0, 20, 69):
        x = sample((2, 70), "normal", torch.float32, generator)
        x[1, column] = bad
        for function, args in ((ops.per_token_quant, ()), (ops.layer_norm_quant, (torch.ones(70),))):
            x_q, x_scale, x_zero = function(x, *args, **setting, backend=backend)
            assert x_scale[0].isfinite()
            assert x_scale[1].isnan()
            assert not x_q[1].float().any()
            assert x_zero[1] == 0


@each_backend
def test_the_smallest_rows(backend: str) -> None:
    x = torch.tensor([[1e-30], [1.1e-30], [9e-31], [1e-45], [-2e-30]])
    for dtype, largest in quant_math.STEPS.items():
        x_q, x_scale, _ = ops.per_token_quant(x, dtype=dtype, backend=backend)
        assert x_q.flatten().tolist() == [largest, largest, 0, 0, -largest]
        assert [s > 0 for s in x_scale.tolist()] == [True, True, False, False, True]


def in_float32(name: str, x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
    if name == "rms_norm":
        return ops.rms_norm(x.float(), weight.float(), backend=backend)
    return ops.layer_norm(x.float(), weight.float(), bias.float(), backend=backend)


def check_against_two_ops(actual: tuple, norm_type: str, x, weight, bias, setting: dict, backend: str) -> None:
    """The bits; on backends of GPUs, which sum a row of 16-bit values in another order, to a few roundings."""
    normed = in_float32(norm_type, x, weight, bias, backend)
    if backend in ("reference", "cpu"):
        assert equal(actual, ops.per_token_quant(normed, **setting, backend=backend))
        return
    terms = layer_norm_terms(x, weight, bias) if norm_type == "layer_norm" else normed.double().abs()
    error = 2 * quant_math.NORM_ERROR * terms
    assert not quant_math.violations(actual, normed.double(), setting.get("symmetric", True), error)


@each_backend
@each_dtype
@each_setting
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_the_bits_of_the_norm_in_float32_and_per_token_quant(norm_type, dtype, setting, backend, generator) -> None:
    for width, distribution in zip((3, 40, 384, 1024, 3200), DISTRIBUTIONS, strict=True):
        x, branch = (sample((2, 3, width), d, dtype, generator) for d in (distribution, "normal"))
        weight, bias, gamma = (sample((width,), "normal", dtype, generator) for _ in range(3))
        args = (weight,) if norm_type == "rms_norm" else (weight, bias)
        quantise: Callable = {"rms_norm": ops.rms_norm_quant, "layer_norm": ops.layer_norm_quant}[norm_type]
        quantised = quantise(x, *args, **setting, backend=backend)
        check_against_two_ops(quantised, norm_type, x, weight, bias, setting, backend)
        for residual in (x, x.float()):
            out, *quantised = ops.layer_scale_residual_norm_quant(
                residual, branch, *args, gamma=gamma, norm_type=norm_type, **setting, backend=backend
            )
            assert torch.equal(out, ops.layer_scale_residual(residual, branch, gamma, backend=backend))
            check_against_two_ops(tuple(quantised), norm_type, out, weight, bias, setting, backend)


@each_backend
@each_dtype
@each_setting
def test_gelu_has_the_bits_of_gelu_in_float32_and_per_token_quant(
    dtype, setting: dict, backend: str, generator
) -> None:
    setting = {"symmetric": True} | setting
    for width, distribution in zip((3, 40, 384, 1024, 3200), DISTRIBUTIONS, strict=True):
        z = sample((2, 3, width), distribution, dtype, generator)
        y = ops.gelu(z.float(), backend=backend)
        expected = ops.per_token_quant(y, **setting, backend=backend)
        assert equal(ops.gelu_quant(z, **setting, backend=backend), expected)


@each_backend
def test_the_same_bits_for_any_number_of_threads(backend: str, generator) -> None:
    x, weight = sample((8, 33, 192), "massive", torch.bfloat16, generator), torch.ones(192)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(ops.layer_norm_quant(x, weight, symmetric=False, backend=backend))
    torch.set_num_threads(before)
    assert all(equal(results[0], other) for other in results)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dtype": torch.uint8}, "dtype must be torch.int8 or torch.float8_e4m3fn, got torch.uint8"),
        ({"dtype": E4M3, "symmetric": False}, "symmetric must be True for dtype torch.float8_e4m3fn"),
    ],
    ids=["dtype", "symmetric"],
)
def test_wrong_quantisations_are_clear_errors(setting: dict, message: str) -> None:
    x, weight = torch.randn(2, 3, 8), torch.randn(8)
    for function, args in (
        (ops.per_token_quant, (x,)),
        (ops.rms_norm_quant, (x, weight)),
        (ops.layer_norm_quant, (x, weight)),
        (ops.layer_scale_residual_norm_quant, (x, x, weight)),
    ):
        with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
            function(*args, **setting)


def test_wrong_tensors_are_clear_errors() -> None:
    with pytest.raises(ValueError, match="per_token_quant: x must be float32, bfloat16, float16 or float64, got"):
        ops.per_token_quant(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="per_token_quant: x must have a last dimension of at least 1"):
        ops.per_token_quant(torch.zeros(2, 0))
    x = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"layer_norm_quant: weight must have shape \[8\]"):
        ops.layer_norm_quant(x, torch.randn(7))
    with pytest.raises(ValueError, match="rms_norm_quant: eps must be a number >= 0, got -1"):
        ops.rms_norm_quant(x, torch.randn(8), eps=-1)
    with pytest.raises(ValueError, match="layer_scale_residual_norm_quant: bias must be None for norm_type='rms_norm'"):
        ops.layer_scale_residual_norm_quant(x, x, torch.randn(8), torch.randn(8))
