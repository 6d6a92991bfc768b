"""The packed Linears of every unit that this machine has: bfloat16, float32 and int8."""

import pytest
import torch
from torch.nn import functional as F

from internvit.numerics import relative_error, sample

cpu = torch.ops.internvit_cpu


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 32, 32), (33, 40, 56), (70, 1056, 17), (545, 64, 96), (300, 1056, 64)]
)
@pytest.mark.parametrize("epilogue", ["none", "gelu", "residual"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_linear(unit: str, rows: int, inputs: int, outputs: int, epilogue: str, dtype, generator) -> None:
    if not cpu.packs_linear(dtype):
        pytest.skip(f"the {unit} unit leaves GEMMs of {dtype} to PyTorch")
    x, weight = (sample(s, "normal", dtype, generator) for s in ((rows, inputs), (outputs, inputs)))
    bias, residual = (sample(s, "normal", dtype, generator) for s in ((outputs,), (rows, outputs)))
    residual = residual if epilogue == "residual" else None
    y = cpu.linear_packed(x, cpu.pack_weight(weight), outputs, bias, residual, epilogue == "gelu")
    truth = F.linear(x.double(), weight.double(), bias.double())
    if epilogue == "gelu":
        truth = F.gelu(truth)
    elif residual is not None:
        truth = truth + residual.double()
    assert relative_error(y, truth) < (
        1.1 * max(relative_error(truth.bfloat16(), truth), 2e-3) if dtype == torch.bfloat16 else 5e-7
    )


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (7, 63, 33), (70, 257, 96), (545, 1000, 40)])
def test_int8_sums_are_exact(unit: str, rows: int, inputs: int, outputs: int, generator) -> None:
    """With scales of 1 the float32 output is the sum, of operands at the ends of their range."""
    if not cpu.multiplies_int8():
        pytest.skip(f"the {unit} unit multiplies no int8")
    x, weight = (torch.randint(-128, 128, s, generator=generator).char() for s in ((rows, inputs), (outputs, inputs)))
    x[0], weight[0] = 127, -128
    zero = torch.randint(-128, 128, (rows,), generator=generator, dtype=torch.int32)
    packed = cpu.pack_weight_int8(weight)
    for shift in (None, zero):
        y = cpu.linear_int8_packed(
            x, torch.ones(rows), packed, torch.ones(outputs), None, shift, None, False, torch.float32
        )
        shifted = x.double() - (0 if shift is None else shift.double()[:, None])
        assert torch.equal(y.double(), F.linear(shifted, weight.double()).float().double())


def test_a_weight_packed_for_another_unit_is_refused(unit: str, generator) -> None:
    """Layouts differ and sizes do not: it would be multiplied to wrong numbers."""
    if not cpu.packs_linear(torch.bfloat16):
        pytest.skip(f"the {unit} unit packs no weights")
    x, weight = (sample(s, "normal", torch.bfloat16, generator) for s in ((3, 64), (32, 64)))
    calls = [(cpu.pack_weight(weight), lambda packed: cpu.linear_packed(x, packed, 32, None, None, False))]
    if cpu.multiplies_int8():
        packed = cpu.pack_weight_int8(torch.ones(32, 64, dtype=torch.int8))
        calls.append((packed, lambda packed: cpu.linear_int8_dynamic(x, packed, torch.ones(32), None, False)))
    for packed, multiply in calls:
        multiply(packed)
        packed.view(torch.uint8)[-8:].view(torch.int64).add_(1)
        with pytest.raises(RuntimeError, match=r"packed for the instruction set in use, \w+, got one of layout"):
            multiply(packed)


@pytest.mark.parametrize("other", ["avx2", "avx512"])
def test_units_do_not_take_each_others_weights(unit: str, other: str, generator) -> None:
    if other not in cpu.instruction_sets().split() or not cpu.packs_linear(torch.bfloat16):
        pytest.skip(f"needs two units with GEMMs of their own; this machine has {cpu.instruction_sets()}")
    x, weight = (sample(s, "normal", torch.bfloat16, generator) for s in ((3, 64), (32, 64)))
    packed, expected = cpu.pack_weight(weight), F.linear(x.double(), weight.double())
    cpu.use_instruction_set(other)
    try:
        if (unit == "avx2") != (other == "avx2"):
            with pytest.raises(RuntimeError, match="must be packed for the instruction set in use"):
                cpu.linear_packed(x, packed, 32, None, None, False)
        else:
            assert relative_error(cpu.linear_packed(x, packed, 32, None, None, False), expected) < 4e-3
    finally:
        cpu.use_instruction_set(unit)
