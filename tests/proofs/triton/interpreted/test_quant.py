"""Rows in int8 and float8 in the interpreter: the reference's bits; norms and GELU with that epilogue."""

import pytest
import torch
from torch.nn import functional as F

from internvit import numerics, ops
from internvit.ops.core import quant_math
from tests.ops.test_inference_ops import equal
from tests.proofs.triton.interpreted.harness import (
    CHANNELS,
    DTYPES,
    ROWS,
    STRIDES,
    Memory,
    fits,
    generator,
    parametrize,
    run,
)

SETTINGS = {"int8": (True, torch.int8), "asymmetric": (False, torch.int8), "float8": (True, torch.float8_e4m3fn)}
FACTORS = {
    "rows": ROWS,
    "channels": CHANNELS,
    "dtype": DTYPES,
    "distribution": numerics.DISTRIBUTIONS,
    "strides": STRIDES,
    "setting": tuple(SETTINGS),
}
SHORT = {**FACTORS, "rows": (1, 3, 17)}


def made(case, memory, g):
    dtype = getattr(torch, case["dtype"])
    x = numerics.sample((1, case["rows"], case["channels"]), case["distribution"], dtype, g)
    x[0, 0, : x.shape[-1] // 2] = 0
    return memory.place(x, case["strides"])


@parametrize(full=("channels", "dtype", "distribution", "setting"), allowed=fits, **FACTORS)
def test_per_token_quant_has_the_references_bits(case):
    g, memory = generator(case), Memory()
    x = made(case, memory, g)
    if case["rows"] > 2:
        x[0, 1], x[0, 2, 1] = 0, float("inf")
    symmetric, dtype = SETTINGS[case["setting"]]
    actual = run(memory, "per_token_quant", x, symmetric, dtype)
    assert equal(actual, ops.per_token_quant(x, symmetric=symmetric, dtype=dtype, backend="reference"))


@parametrize(full=("channels", "dtype", "distribution", "setting"), **SHORT)
def test_gelu_quant(case):
    g, memory = generator(case), Memory()
    z, (symmetric, dtype) = made(case, memory, g), SETTINGS[case["setting"]]
    actual = run(memory, "gelu_quant", z, symmetric, dtype)
    exact = F.gelu(z.double())
    assert not quant_math.violations(actual, exact, symmetric, 1e-6 * exact.abs() + 1e-7 * z.double().abs())
    y = ops.gelu(z.float(), backend="triton")
    assert equal(actual, ops.per_token_quant(y, symmetric=symmetric, dtype=dtype, backend="reference"))


@parametrize(full=("channels", "dtype", "distribution", "setting"), norm=("rms_norm", "layer_norm"), **SHORT)
def test_norms(case):
    """The bits of the norm in float32, which the interpreter adds in one order for all dtypes, and per_token_quant."""
    g, memory = generator(case), Memory()
    dtype, (symmetric, to) = getattr(torch, case["dtype"]), SETTINGS[case["setting"]]
    x, branch = (made({**case, "distribution": d}, memory, g) for d in (case["distribution"], "normal"))
    weight, bias, gamma = (
        memory.place(numerics.sample((case["channels"],), "normal", dtype, g).float() / 3) for _ in range(3)
    )
    is_layer_norm = case["norm"] == "layer_norm"
    parameters = (weight, bias) if is_layer_norm else (weight,)

    def expected(t):
        function = ops.layer_norm if is_layer_norm else ops.rms_norm
        y = function(t.float(), *parameters, backend="triton")
        return ops.per_token_quant(y, symmetric=symmetric, dtype=to, backend="reference")

    assert equal(run(memory, f"{case['norm']}_quant", x, *parameters, 1e-6, symmetric, to), expected(x))
    for residual in (x, x.float()):
        args = (residual, branch, gamma, None, weight, bias if is_layer_norm else None, 1e-6, case["norm"])
        out, *quantised = run(memory, "layer_scale_residual_norm_quant", *args, symmetric, to)
        assert torch.equal(out, ops.layer_scale_residual(residual, branch, gamma, backend="triton"))
        assert equal(tuple(quantised), expected(out))


def test_rows_of_the_6b_mlp_and_wider():
    z = torch.randn(2, 12800).bfloat16()
    actual, expected = (ops.gelu_quant(z, backend=b) for b in ("triton", "reference"))
    assert (actual[0].int() - expected[0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match=r"per_token_quant: .* at most 16384 channels, got 16385"):
        ops.per_token_quant(torch.zeros(1, 16385), backend="triton")


def test_every_float8_value_and_what_lies_between():
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    middles = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)]).float()
    x = torch.cat([x, -x, torch.randn(1000), torch.randn(1000) / 100])
    pairs = [ops.per_token_quant(x, dtype=torch.float8_e4m3fn, backend=b) for b in ("triton", "reference")]
    assert equal(*pairs)
