"""int8 Linears fused with what stands before and behind them: norms, the GELU between fc1 and fc2, the residual."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.inference import linear_int8
from internvit.inference.linear_int8 import GROUP, Int8Linear, Int8MLP, quantize_weight
from internvit.model.fused_block import Norm, QuantizedRows
from internvit.numerics import relative_error

pytestmark = pytest.mark.skipif(
    linear_int8.unavailable_reason() is not None, reason=str(linear_int8.unavailable_reason())
)


def linears(width: int, hidden: int, generator: torch.Generator) -> tuple[Int8Linear, Int8Linear]:
    """fc1 and fc2."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    gamma = draw(width)
    return (
        Int8Linear(draw(hidden, width) * width**-0.5, draw(hidden)),
        Int8Linear(draw(width, hidden) * hidden**-0.5, draw(width), gamma),
    )


def quantised(x: Tensor) -> QuantizedRows:
    return QuantizedRows(*ops.per_token_quant(x, symmetric=False))


def restored(linear: Int8Linear, out_features: int) -> Tensor:
    """The weight that `linear` multiplies by, in float64: its products with unit vectors."""
    width = linear.in_features
    unit = QuantizedRows(torch.eye(width, dtype=torch.int8), torch.ones(width), torch.zeros(width, dtype=torch.int32))
    packed = torch.ops.internvit_cpu.linear_int8_packed
    y = packed(unit.x_q, unit.x_scale, linear.packed, linear.weight_scale, None, None, None, False, torch.float32)
    assert y.shape == (width, out_features)
    return y.double().t()


@pytest.mark.parametrize(("rows", "width", "hidden"), [(1, 1, 1), (13, 40, 100), (257, 64, 513), (300, 130, 1100)])
@pytest.mark.parametrize("given", [False, True])
def test_an_mlp_errs_as_float64_with_its_operands_rounded(
    rows: int, width: int, hidden: int, given: bool, generator
) -> None:
    fc1, fc2 = linears(width, hidden, generator)
    x = torch.randn((rows, width), generator=generator).bfloat16()
    (x_q, x_scale, x_zero) = quantised(x)
    exact_x = (x_q.double() - x_zero[:, None]) * x_scale.double()[:, None]
    z = F.gelu(F.linear(exact_x, restored(fc1, hidden), fc1.bias.double()))
    low, high = z.amin(-1, keepdim=True).clamp(max=0), z.amax(-1, keepdim=True).clamp(min=0)
    step = ((high - low) / 255).clamp(min=1e-300)
    zero = (-low / step).round()
    rounded = (((z / step).round() + zero).clamp(0, 255) - zero) * step
    truth, emulated = (F.linear(h, restored(fc2, width), fc2.bias.double()) for h in (z, rounded))
    y = Int8MLP(fc1, fc2)(quantised(x) if given else x)
    assert y.dtype == torch.bfloat16
    # A value beside the middle of two steps may go to either: few elements scatter.
    assert relative_error(y, truth) <= (1.1 if y.numel() > 5000 else 2.0) * relative_error(emulated.bfloat16(), truth)


def test_an_mlp_has_the_bits_of_its_parts_but_for_the_gelus_rounding(generator) -> None:
    fc1, fc2 = linears(64, 256, generator)
    x = torch.randn((2, 100, 64), generator=generator).bfloat16()
    assert relative_error(Int8MLP(fc1, fc2)(x), fc2(fc1(x, gelu=True))) < 0.01
    assert torch.equal(Int8MLP(fc1, fc2)(quantised(x)), Int8MLP(fc1, fc2)(x))
    assert torch.equal(fc1(quantised(x)), fc1(x))


def test_an_mlp_on_any_number_of_threads_and_in_any_batch(generator) -> None:
    fc1, fc2 = linears(64, 4100, generator)  # blocks of 7 strips
    x = torch.randn((3, 257, 64), generator=generator).bfloat16()
    mlp, before, results = Int8MLP(fc1, fc2), torch.get_num_threads(), []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(mlp(x))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)
    assert all(torch.equal(mlp(x[:batch]), results[0][:batch]) for batch in (1, 2))
    assert mlp(x[:0]).shape == (0, 257, 64)
    strided = torch.cat([x, x], -1)[..., :64]
    assert torch.equal(mlp(strided), results[0])
    assert torch.equal(mlp(x.repeat_interleave(2, -1)[..., ::2]), results[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_stay_so(bad: float, generator) -> None:
    fc1, fc2 = linears(70, 130, generator)
    x = torch.randn((30, 70), generator=generator)
    x[7, 69] = bad
    y = Int8MLP(fc1, fc2)(x)
    assert y[7].isnan().all()
    assert y.isnan().sum() == 70


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_norm_hands_int8_rows_to_the_linear(norm_type: str, generator) -> None:
    fc1, _ = linears(192, 100, generator)
    x = torch.randn((2, 37, 192), generator=generator)
    weight, bias = (torch.randn(192, generator=generator).bfloat16() for _ in range(2))
    norm = Norm(norm_type, weight, bias if norm_type == "layer_norm" else None, 1e-6)
    plain, rows = norm(x), norm._replace(quantized=True)(x)
    assert isinstance(rows, QuantizedRows)
    assert rows.x_q.dtype == torch.int8
    assert relative_error((rows.x_q.double() - rows.x_zero[..., None]) * rows.x_scale[..., None], plain) < 0.02
    assert relative_error(fc1(rows), fc1(plain)) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 7, 1), (37, 1100, 50), (130, 64, 33)])
def test_a_residual_is_added_before_the_only_rounding(rows: int, depth: int, columns: int, dtype, generator) -> None:
    fc1, _ = linears(depth, columns, generator)
    x = quantised(torch.randn((rows, depth), generator=generator))
    residual = 10 * torch.randn((rows, 2 * columns), generator=generator).to(dtype)[:, :columns]
    packed = torch.ops.internvit_cpu.linear_int8_packed
    y = packed(x.x_q, x.x_scale, *fc1.weight, x.x_zero, residual, False, dtype)
    plain = packed(x.x_q, x.x_scale, *fc1.weight, x.x_zero, None, False, torch.float32)
    assert torch.equal(y, (plain + residual).to(dtype))


@pytest.mark.parametrize(("rows", "depth", "columns"), [(1, 1, 1), (13, 128, 33), (37, 129, 31), (70, 1100, 40)])
def test_a_grouped_weight_has_a_scale_for_each_group(rows: int, depth: int, columns: int, generator) -> None:
    weight = torch.randn((columns, depth), generator=generator)
    weight *= 10 ** torch.linspace(-2, 0, depth)  # later groups hide earlier ones from a common scale
    weight_q, scale, ratio = quantize_weight(weight, grouped=True)
    assert ratio.shape == (columns, -(-depth // GROUP))
    assert ratio.amax() == 1
    steps = (scale[:, None] * ratio).repeat_interleave(GROUP, 1)[:, :depth].double()
    assert ((weight_q * steps - weight).abs() <= 0.50001 * steps).all()
    x = torch.randn((rows, depth), generator=generator)
    x_q, x_scale, x_zero = quantised(x)
    exact_x = (x_q.double() - x_zero[:, None]) * x_scale.double()[:, None]
    gamma, bias = (torch.randn(columns, generator=generator) for _ in range(2))
    truth = F.linear(exact_x, weight_q * steps * gamma.double()[:, None], (bias * gamma).double())
    y = Int8Linear(weight, bias, gamma, grouped=True)(x)
    terms = F.linear(exact_x.abs(), (weight_q * steps * gamma.double()[:, None]).abs()) + bias.abs()
    shift = (x_zero.abs() * x_scale)[:, None] * (steps.amax(1) * gamma.abs() * 127 * depth**0.5)
    assert ((y - truth).abs() <= 3e-6 * (terms + shift)).all()


def test_groups_leave_less_error(generator) -> None:
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((200, 1024), (300, 1024)))
    weight[torch.rand(weight.shape, generator=generator) < 0.001] *= 8
    truth = F.linear(x.double(), weight.double())
    errors = [relative_error(Int8Linear(weight, None, grouped=grouped)(x), truth) for grouped in (False, True)]
    print(f"{errors[0]:.2%}, grouped {errors[1]:.2%}")
    assert errors[1] < 0.8 * errors[0]


def test_grouped_weights_in_any_batch_and_on_any_number_of_threads(generator) -> None:
    draw = lambda *shape: torch.randn(shape, generator=generator).bfloat16()  # noqa: E731
    fc1, fc2 = Int8Linear(draw(1030, 200), draw(1030), grouped=True), Int8Linear(draw(200, 1030), None, grouped=True)
    x, mlp, before, results = draw(3, 257, 200), Int8MLP(fc1, fc2), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((mlp(x), fc2(fc1(x, gelu=True))))
    torch.set_num_threads(before)
    assert all(all(map(torch.equal, results[0], other)) for other in results)
    assert torch.equal(mlp(x[1:2]), results[0][0][1:2])
    assert relative_error(*results[0]) < 0.01


def test_wrong_arguments_are_clear_errors(generator) -> None:
    fc1, fc2 = linears(64, 96, generator)
    x = torch.randn(3, 64).bfloat16()
    rows, mlp = quantised(x), torch.ops.internvit_cpu.mlp_int8
    for args, message in (
        ((x, None, None, *fc1.weight, *fc1.weight), "fc2_weight must have fc1_weight's 96 output features"),
        ((x, rows.x_scale, None, *fc1.weight, *fc2.weight), "x must be Char with x_scale on cpu, got BFloat16"),
        (
            (rows.x_q, None, None, *fc1.weight, *fc2.weight),
            "Float or BFloat16 without x_scale on cpu, got Char",
        ),
        ((x, None, rows.x_zero, *fc1.weight, *fc2.weight), "x_zero must be None without x_scale"),
        ((x[:, :32], None, None, *fc1.weight, *fc2.weight), "x must have packed_weight's 64 input features"),
        ((rows.x_q, rows.x_scale[:2], None, *fc1.weight, *fc2.weight), r"x_scale must have shape \[3\], got \[2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            mlp(*args, torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype must be Float or BFloat16, got Half"):
        mlp(x, None, None, *fc1.weight, *fc2.weight, torch.float16)
    packed = torch.ops.internvit_cpu.linear_int8_packed
    for residual, gelu, message in (
        (torch.zeros(3, 95), False, r"residual must have shape \[3, 96\], got \[3, 95\]"),
        (torch.zeros(3, 96).bfloat16(), False, "residual must be Float on cpu, got BFloat16"),
        (torch.zeros(3, 96), True, "residual must be None where gelu is true"),
    ):
        with pytest.raises(RuntimeError, match=message):
            packed(rows.x_q, rows.x_scale, *fc1.weight, rows.x_zero, residual, gelu, torch.float32)
