"""Linears of int8 operands: exact sums, the nearest int8 values, the same bits on every backend and for any batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import product_violations, relative_error, sample
from internvit.ops.backends.registry import backends_for

BACKENDS = backends_for("linear_int8", "cpu", torch.float32)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def test_the_cpu_library_has_the_op_where_the_machine_multiplies_int8() -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists() or "avx2" not in info.read_text().split():
        pytest.skip("needs AVX2")
    assert "cpu" in BACKENDS


SHAPES = [(1, 1, 1), (12, 64, 32), (13, 65, 33), (70, 511, 17), (545, 513, 96), (37, 2049, 31), (25, 4100, 48)]


@each_backend
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(rows: int, depth: int, columns: int, gelu: bool, dtype, backend: str, generator) -> None:
    x_q, weight_q = (torch.randint(-128, 128, s, generator=generator).char() for s in ((rows, depth), (columns, depth)))
    x_scale, weight_scale = (torch.randn(n, generator=generator) * depth**-0.5 / 50 for n in (rows, columns))
    bias = torch.randn(columns, generator=generator)
    y = ops.linear_int8(x_q, x_scale, weight_q, weight_scale, bias, gelu=gelu, dtype=dtype, backend=backend)
    product = F.linear(x_q.double(), weight_q.double()) * x_scale.double()[:, None] * weight_scale.double()
    truth = F.gelu(product + bias.double()) if gelu else product + bias.double()
    if dtype == torch.float32 or y.numel() == 1:  # no other elements to be judged by where product and bias cancel
        allowed = 8 * torch.finfo(torch.float32).eps * (product.abs() + bias.double().abs())
        allowed += 0.55 * torch.finfo(dtype).eps * truth.abs()
        assert ((y.double() - truth).abs() <= allowed).all()
    else:
        assert not product_violations(y, truth, truth.to(dtype), 1.1)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_residual_is_added_before_the_only_rounding(dtype: torch.dtype, backend: str, generator) -> None:
    x_q, weight_q = (torch.randint(-128, 128, s, generator=generator).char() for s in ((2, 13, 96), (70, 96)))
    x_scale, weight_scale = (torch.rand(s, generator=generator) / 100 for s in ((2, 13), (70,)))
    residual = sample((2, 13, 70), "massive", dtype, generator)
    operands = (x_q, x_scale, weight_q, weight_scale)
    y = ops.linear_int8(*operands, residual=residual, dtype=dtype, backend=backend)
    product = F.linear(x_q.double(), weight_q.double()) * x_scale.double().unsqueeze(-1) * weight_scale.double()
    allowed = 8 * torch.finfo(torch.float32).eps * (product.abs() + residual.double().abs())
    allowed += 0.501 * torch.finfo(dtype).eps * (residual.double() + product).abs()
    assert ((y.double() - residual.double() - product).abs() <= allowed).all()
    strided = residual.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.linear_int8(*operands, residual=strided, dtype=dtype, backend=backend), y)
    with pytest.raises(ValueError, match="residual must be None where gelu is True"):
        ops.linear_int8(*operands, residual=residual, dtype=dtype, gelu=True, backend=backend)


@each_backend
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(sign: int, backend: str) -> None:
    x_q = torch.full((2, 65536), -128, dtype=torch.int8)
    weight_q = torch.full((3, 65536), 127 if sign > 0 else -128, dtype=torch.int8)
    x_q[1] = 127
    ones = torch.ones(3)
    zeros = torch.tensor([127, -128], dtype=torch.int32)
    for x_zero in (None, zeros):
        y = ops.linear_int8(x_q, ones[:2], weight_q, ones, x_zero=x_zero, dtype=torch.float32, backend=backend)
        centred = x_q.double() - (0 if x_zero is None else x_zero[:, None])
        assert torch.equal(y, F.linear(centred, weight_q.double()).float())


@pytest.mark.parametrize("distribution", ["normal", "massive", "near_zero"])
def test_a_linear_errs_as_float64_with_these_operands_rounded(distribution: str, generator) -> None:
    x = sample((64, 768), distribution, torch.bfloat16, generator)
    weight = sample((256, 768), "normal", torch.bfloat16, generator)
    truth = F.linear(x.double(), weight.double())

    def nearest(t: Tensor) -> Tensor:
        scale = t.double().abs().amax(-1, keepdim=True) / 127
        return (t.double() / scale).round() * scale

    emulated = F.linear(nearest(x), nearest(weight)).bfloat16()
    (x_q, x_scale, _), (weight_q, weight_scale, _) = map(ops.per_token_quant, (x, weight))
    y = ops.linear_int8(x_q, x_scale, weight_q, weight_scale)
    print(f"{distribution}: {relative_error(y, truth):.2e}")
    assert not product_violations(y, truth, emulated, 1.1)


@each_backend
def test_the_same_bits_for_any_number_of_threads_and_any_batch(backend: str, generator) -> None:
    x = sample((8, 257, 192), "massive", torch.bfloat16, generator)
    weight_q, weight_scale, _ = ops.per_token_quant(sample((200, 192), "normal", torch.float32, generator))

    def run(batch: int) -> Tensor:
        x_q, x_scale, x_zero = ops.per_token_quant(x[:batch], symmetric=False, backend=backend)
        return ops.linear_int8(x_q, x_scale, weight_q, weight_scale, x_zero=x_zero, backend=backend)

    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(run(8))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)
    assert all(torch.equal(run(batch), results[0][:batch]) for batch in (1, 2, 3))


def arguments() -> dict[str, Any]:
    return {
        "x_q": torch.zeros(2, 8, dtype=torch.int8),
        "x_scale": torch.zeros(2),
        "weight_q": torch.zeros(4, 8, dtype=torch.int8),
        "weight_scale": torch.zeros(4),
        "bias": torch.zeros(4),
        "x_zero": torch.zeros(2, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_q", torch.zeros(2, 8), "x_q must be int8, got torch.float32"),
        ("x_q", torch.tensor(1, dtype=torch.int8), "x_q must have a last dimension of at least 1"),
        ("weight_q", torch.zeros(4, 8), "weight_q must be int8, got torch.float32"),
        ("weight_q", torch.zeros(4, 7, dtype=torch.int8), r"weight_q must have shape \[M, 8\] .* got \[4, 7\]"),
        ("x_scale", torch.zeros(2, 1), r"x_scale must have shape \[2\] .* got \[2, 1\]"),
        ("x_scale", torch.zeros(2).double(), "x_scale must be float32, got torch.float64"),
        ("x_zero", torch.zeros(1, dtype=torch.int32), r"x_zero must have shape \[2\] .* got \[1\]"),
        ("x_zero", torch.zeros(2), "x_zero must be int32, got torch.float32"),
        ("weight_scale", torch.zeros(3), r"weight_scale must have shape \[4\]"),
        ("weight_scale", torch.zeros(4).bfloat16(), "weight_scale must be float32, got torch.bfloat16"),
        ("bias", torch.zeros(5), r"bias must have shape \[4\]"),
        ("bias", torch.zeros(4).half(), "bias must be float32, got torch.float16"),
        (
            "residual",
            torch.zeros(2, 4),
            r"residual must have the output's shape \[2, 4\] and dtype torch.bfloat16, got",
        ),
        ("residual", torch.zeros(4).bfloat16(), r"residual must have the output's shape \[2, 4\] .* got \[4\]"),
        ("dtype", torch.float16, "dtype must be torch.bfloat16 or torch.float32, got torch.float16"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_wrong_arguments_are_clear_errors(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_int8: {message}"):
        ops.linear_int8(**(arguments() | {name: value}))


def test_too_many_input_features() -> None:
    deep = {"x_q": torch.zeros(2, 65537, dtype=torch.int8), "weight_q": torch.zeros(4, 65537, dtype=torch.int8)}
    with pytest.raises(ValueError, match="x_q must have at most 65536 input features, got 65537"):
        ops.linear_int8(**(arguments() | deep))
