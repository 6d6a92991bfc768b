"""The int8 ops: exact sums, the nearest int8 values, the same bits on every backend and for any batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import DISTRIBUTIONS, product_violations, relative_error, sample
from internvit.ops.backends.registry import backends_for
from internvit.ops.core.spec import INFERENCE_SPECS, TINY, Inputs, OpSpec, batched

BACKENDS = backends_for("linear_int8", "cpu", torch.float32)
ROWS = ("x_q", "x_scale", "x_zero")
CASES = [(spec, variant) for spec in INFERENCE_SPECS.values() for variant in spec.examples]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_case = pytest.mark.parametrize(("spec", "variant"), CASES, ids=[f"{s.name}-{v}" for s, v in CASES])


def test_the_cpu_library_has_both_ops_where_the_machine_multiplies_int8() -> None:
    info = Path("/proc/cpuinfo")
    if not info.exists() or not {"avx512_vnni", "avx512_bf16"} <= set(info.read_text().split()):
        pytest.skip("needs AVX-512 VNNI and BF16")
    assert "cpu" in BACKENDS
    assert "cpu" in backends_for("per_token_quant_int8", "cpu", torch.bfloat16)


@each_backend
@each_case
def test_what_every_op_keeps(spec: OpSpec, variant: str, backend: str, generator: torch.Generator) -> None:
    arguments = spec.examples[variant](Inputs(TINY, generator))
    outputs = spec.run(arguments, backend)
    assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs)
    for ours, reference in zip(outputs, spec.run(arguments, "reference"), strict=True):
        assert ours.dtype == reference.dtype
        assert ours.shape == reference.shape
    op = getattr(torch.ops.internvit, spec.op).default
    names = [a.name for a in op._schema.arguments[:-1]]
    defaults = {"gelu": False, "dtype": torch.bfloat16, "symmetric": True}
    values = tuple((defaults | arguments)[name] for name in names)
    torch.library.opcheck(op, (*values, backend))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: spec.run(arguments, backend), fullgraph=True, backend="aot_eager")()
    assert all(map(torch.equal, compiled, outputs))
    strided = {n: t.repeat_interleave(2, -1)[..., ::2] if isinstance(t, Tensor) else t for n, t in arguments.items()}
    assert all(map(torch.equal, spec.run(strided, backend), outputs))
    for images in (0, 1):
        first = {n: arguments[n][:images] for n in (*batched(arguments), *ROWS) if arguments.get(n) is not None}
        fewer = spec.run(arguments | first, backend)
        assert all(torch.equal(few, all_of_them[:images]) for few, all_of_them in zip(fewer, outputs, strict=True))


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("width", [3, 17, 64, 200])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantised_rows(distribution: str, dtype, width: int, symmetric: bool, backend: str, generator) -> None:
    x = sample((3, 5, width), distribution, dtype, generator)
    x[0, 0] = 0
    x[0, 1] = F.gelu(x[0, 1])
    outputs = ops.per_token_quant_int8(x, symmetric=symmetric, backend=backend)
    expected = ops.per_token_quant_int8(x, symmetric=symmetric, backend="reference")
    assert all(map(torch.equal, outputs, expected))
    x_q, x_scale, x_zero = outputs
    assert not x_q[0, 0].any()
    assert x_scale[0, 0] == x_zero[0, 0] == 0
    if symmetric:
        assert not x_zero.any()
        assert (x_q[1:].abs().amax(-1) == 127).all()
    else:
        assert x_zero.abs().max() <= 128
        assert (x_q[1:].amax(-1) - x_q[1:].amin(-1).int() <= 255).all()
    error = ((x_q.double() - x_zero.unsqueeze(-1)) * x_scale.double().unsqueeze(-1) - x.double()).abs().amax(-1)
    assert (error <= (0.50001 if symmetric else 1.00001) * x_scale.double()).all()


@each_backend
def test_a_zero_point_doubles_the_resolution_of_a_gelus_output(backend: str, generator) -> None:
    x, errors = F.gelu(sample((50, 400), "normal", torch.float32, generator)), []
    for symmetric in (True, False):
        x_q, x_scale, x_zero = ops.per_token_quant_int8(x, symmetric=symmetric, backend=backend)
        errors.append(relative_error((x_q - x_zero.unsqueeze(-1)) * x_scale.unsqueeze(-1), x))
    assert errors[1] < 0.6 * errors[0]


@each_backend
def test_ties_go_to_even_and_the_sign_is_kept(backend: str) -> None:
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0, 126.5])
    x_q, x_scale, _ = ops.per_token_quant_int8(x, backend=backend)
    assert x_q.tolist() == [127, 0, 2, 2, 0, -2, -127, 126]
    assert x_scale.item() == 1.0


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [0, 20, 69])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_stays_so(bad: float, column: int, symmetric: bool, backend: str) -> None:
    x = torch.randn(2, 70)
    x[1, column] = bad
    x_q, x_scale, x_zero = ops.per_token_quant_int8(x, symmetric=symmetric, backend=backend)
    weight_q, weight_scale, _ = ops.per_token_quant_int8(torch.randn(33, 70))
    y = ops.linear_int8(x_q, x_scale, weight_q, weight_scale, x_zero=x_zero, backend=backend)
    assert y[0].isfinite().all()
    assert y[1].isnan().all()


@each_backend
def test_the_smallest_rows(backend: str) -> None:
    x = torch.tensor([[1e-30], [1.1e-30], [9e-31], [1e-45], [-2e-30]])
    x_q, x_scale, _ = ops.per_token_quant_int8(x, backend=backend)
    assert x_q.flatten().tolist() == [127, 127, 0, 0, -127]
    assert [s > 0 for s in x_scale.tolist()] == [True, True, False, False, True]


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
    (x_q, x_scale, _), (weight_q, weight_scale, _) = map(ops.per_token_quant_int8, (x, weight))
    y = ops.linear_int8(x_q, x_scale, weight_q, weight_scale)
    print(f"{distribution}: {relative_error(y, truth):.2e}")
    assert not product_violations(y, truth, emulated, 1.1)


@each_backend
def test_the_same_bits_for_any_number_of_threads_and_any_batch(backend: str, generator) -> None:
    x = sample((8, 257, 192), "massive", torch.bfloat16, generator)
    weight_q, weight_scale, _ = ops.per_token_quant_int8(sample((200, 192), "normal", torch.float32, generator))

    def run(batch: int) -> Tensor:
        x_q, x_scale, x_zero = ops.per_token_quant_int8(x[:batch], symmetric=False, backend=backend)
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
        ("dtype", torch.float16, "dtype must be torch.bfloat16 or torch.float32, got torch.float16"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_wrong_arguments_are_clear_errors(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_int8: {message}"):
        ops.linear_int8(**(arguments() | {name: value}))


def test_other_errors() -> None:
    with pytest.raises(ValueError, match="per_token_quant_int8: x must be float32, bfloat16, float16 or float64, got"):
        ops.per_token_quant_int8(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match="per_token_quant_int8: x must have a last dimension of at least 1"):
        ops.per_token_quant_int8(torch.zeros(2, 0))
    deep = {"x_q": torch.zeros(2, 65537, dtype=torch.int8), "weight_q": torch.zeros(4, 65537, dtype=torch.int8)}
    with pytest.raises(ValueError, match="x_q must have at most 65536 input features, got 65537"):
        ops.linear_int8(**(arguments() | deep))
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no derivative"):
        ops.per_token_quant_int8(x)[1].sum().backward()
