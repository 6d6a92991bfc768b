"""Rows as int8 or float8_e4m3fn with a float32 scale each: the arithmetic, validation and tolerance of every op that
writes them.

    int8, symmetric:  x_scale = max |x| / 127,  x_zero = 0
    int8, else:       x_scale = (high - low) / 255,  x_zero = round(-low / x_scale) - 128
    float8_e4m3fn:    x_scale = max |x| / 448,  x_zero = 0
    x_q = round(x / x_scale) + x_zero,  low = min(x, 0),  high = max(x, 0)

Computed in float32, with the scale's inverse as a factor, and rounded to nearest even: every backend gives the same
bits. A row with a value that is not finite has a scale of NaN, one of a range below 1e-30 a scale of 0; both are zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1e-30
"""The inverse of a scale stays finite for ranges above it."""
E4M3 = torch.float8_e4m3fn
QUANTIZED = (torch.int8, E4M3)
STEPS = {torch.int8: 127.0, E4M3: 448.0}
"""The largest value of each, symmetric."""
NORM_ERROR = 8 * torch.finfo(torch.float32).eps
"""How much of its absolute terms a norm in float32 may be off, see `norm_violations`."""
OUTPUTS = "Tensor x_q, Tensor x_scale, Tensor x_zero"
Quantized = tuple[Tensor, Tensor, Tensor]
"""x_q, x_scale and x_zero."""


def quantize_rows(x: Tensor, symmetric: bool, dtype: torch.dtype) -> Quantized:
    """Each row of x [..., K] as x_q [..., K], x_scale [...] float32 and x_zero [...] int32."""
    wide = x.float()
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    span = torch.maximum(-low, high) if symmetric else high - low
    # A number over a tensor would be times its reciprocal.
    steps = torch.full_like(span, STEPS[dtype] if symmetric else 255.0)
    finite, zero_row = span < torch.inf, span < SMALLEST
    inverse = torch.where(finite & ~zero_row, steps / span, 0.0)
    scale = torch.where(zero_row, 0.0, torch.where(finite, span / steps, torch.nan))
    x_zero = torch.zeros_like(span, dtype=torch.int32)
    if not symmetric:
        x_zero = torch.where(inverse > 0, (-low * inverse).nan_to_num(0.0).round().int() - 128, x_zero)
    whole = (wide * inverse.unsqueeze(-1)).nan_to_num(0.0)
    if dtype == torch.int8:
        whole = (whole.round().int() + x_zero.unsqueeze(-1)).clamp(-128, 127)
    else:
        whole = whole.clamp(-STEPS[dtype], STEPS[dtype])
    return whole.to(dtype).contiguous(), scale, x_zero


def validate(op: str, symmetric: bool, dtype: torch.dtype) -> None:
    if dtype not in QUANTIZED:
        raise ValueError(f"{op}: dtype must be torch.int8 or torch.float8_e4m3fn, got {dtype}")
    if dtype != torch.int8 and not symmetric:
        raise ValueError(f"{op}: symmetric must be True for dtype {dtype}, which has no zero point, got False")


def fake(x: Tensor, dtype: torch.dtype) -> Quantized:
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )


def restored(x_q: Tensor, x_scale: Tensor, x_zero: Tensor) -> Tensor:
    """x_scale * (x_q - x_zero) in float64."""
    return (x_q.double() - x_zero.unsqueeze(-1)) * x_scale.double().unsqueeze(-1)


def violations(actual: Quantized, truth: Tensor, symmetric: bool, error: Tensor | float = 0.0) -> list[str]:
    """What quantised rows break of the contract.

    x_scale * (x_q - x_zero) is the truth to half a scale, or to one where the largest value is clamped to a step; in
    float8 to half a unit in the last place, 1/16 of the value, or half of the smallest step. The scale is that of the
    truth to a few roundings.

    Args:
        actual: what an op wrote.
        truth: float64, what it quantised.
        error: per element, that of the float32 arithmetic before.
    """
    x_q, x_scale, _ = actual
    exact = quantize_rows_exactly(truth, symmetric, x_q.dtype)
    if x_q.dtype == torch.int8:
        reach = torch.as_tensor(0.5001 if symmetric else 1.0001) * exact.unsqueeze(-1)
    else:
        reach = torch.maximum(truth.abs() / 16, exact.unsqueeze(-1) * 2**-10) * 1.0001
    far = (restored(*actual) - truth).abs() > reach + error
    error = torch.as_tensor(error, dtype=torch.float64).expand_as(truth).amax(-1)
    span = STEPS[x_q.dtype] if symmetric else 127.5  # one of the two ends may be off
    wrong = far.sum() + ((x_scale - exact).abs() > 1e-6 * exact + error / span).sum()
    what = "int8" if x_q.dtype == torch.int8 else "float8"
    return [f"{int(wrong)} elements or scales are not those of the nearest {what} values"] if wrong else []


def quantize_rows_exactly(x: Tensor, symmetric: bool, dtype: torch.dtype) -> Tensor:
    """The scales of x [..., K] in float64."""
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    return torch.maximum(-low, high) / STEPS[dtype] if symmetric else (high - low) / 255


def formula(x: Tensor, symmetric: bool = True, dtype: torch.dtype = torch.int8) -> Quantized:
    """In plain PyTorch, without the roundings to `dtype`."""
    scale = quantize_rows_exactly(x, symmetric, dtype)
    zero = torch.zeros_like(scale) if symmetric else (-x.amin(-1).clamp(max=0) / scale).round() - 128
    whole = x / scale.unsqueeze(-1)
    return (whole.round() if dtype == torch.int8 else whole) + zero.unsqueeze(-1), scale, zero


Example = Callable[[Any], dict[str, Any]]


def variants(examples: dict[str, Example]) -> dict[str, Example]:
    """Each example in int8 with and without a zero point, and in float8."""
    settings: dict[str, dict[str, Any]] = {"": {}, "asymmetric": {"symmetric": False}, "float8": {"dtype": E4M3}}

    def with_settings(example: Example, more: dict[str, Any]) -> Example:
        return lambda make: example(make) | more

    return {
        ", ".join(filter(None, (name, how))): with_settings(example, more)
        for name, example in examples.items()
        for how, more in settings.items()
    }
