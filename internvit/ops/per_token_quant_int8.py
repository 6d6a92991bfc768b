"""int8 quantisation of each row: the operands of `linear_int8`.

    symmetric:  x_scale = max |x| / 127,  x_zero = 0
    else:       x_scale = (high - low) / 255,  x_zero = round(-low / x_scale) - 128,  low = min(x, 0), high = max(x, 0)
    x_q = round(x / x_scale) + x_zero,  x = x_scale * (x_q - x_zero) to half a scale

x [..., K] of dtype T (float32, bfloat16, float16, float64); x_q [..., K] int8; x_scale [...] float32; x_zero [...]
int32. Computed in float32, with the scale's inverse as a factor, and rounded to nearest even: every backend gives the
same bits.
"""

import torch
from torch import Tensor

from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, OpSpec, register_inference_spec

OP = "per_token_quant_int8"
SMALLEST = 1e-30
"""The inverse of a scale stays finite for ranges above it."""


@implements(OP, "reference")
def per_token_quant_int8_reference(x: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    span = torch.maximum(-low, high) if symmetric else high - low
    steps = torch.full_like(span, 127.0 if symmetric else 255.0)  # a number over a tensor would be times its reciprocal
    finite, zero_row = span < torch.inf, span < SMALLEST
    inverse = torch.where(finite & ~zero_row, steps / span, 0.0)
    scale = torch.where(zero_row, 0.0, torch.where(finite, span / steps, torch.nan))
    x_zero = torch.zeros_like(span, dtype=torch.int32)
    if not symmetric:
        x_zero = torch.where(inverse > 0, (-low * inverse).nan_to_num(0.0).round().int() - 128, x_zero)
    whole = (wide * inverse.unsqueeze(-1)).nan_to_num(0.0).round().int() + x_zero.unsqueeze(-1)
    return whole.clamp(-128, 127).to(torch.int8).contiguous(), scale, x_zero


def _validate(x: Tensor, symmetric: bool) -> None:
    check.rows(OP, "x", x)
    check.floating(OP, x=x)


PER_TOKEN_QUANT_INT8 = define(
    f"{OP}(Tensor x, bool symmetric) -> (Tensor x_q, Tensor x_scale, Tensor x_zero)",
    fake=lambda x, symmetric, backend: (
        x.new_empty(x.shape, dtype=torch.int8),
        *(x.new_empty(x.shape[:-1], dtype=dtype) for dtype in (torch.float32, torch.int32)),
    ),
    validate=_validate,
)


def per_token_quant_int8(
    x: Tensor, *, symmetric: bool = True, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises each row to int8, with a scale and a zero point of its own.

    x_q = round(x / x_scale) + x_zero, to nearest even

    Args:
        x: [..., K], float32, bfloat16, float16 or float64, any strides.
        symmetric: scales by max |x| / 127 with a zero point of 0, for weights; otherwise by the range from min(x, 0) to
            max(x, 0) over 255, which has twice the resolution for a GELU's output.
        backend: overrides `internvit.backend`.

    Returns:
        x_q: [..., K], int8, contiguous.
        x_scale: [...], float32. 0 for rows of a range below 1e-30, NaN for rows with a value that is not finite.
        x_zero: [...], int32, in -128 to 127; x is x_scale * (x_q - x_zero) to half a scale.

    Raises:
        ValueError: a wrong shape or dtype. RuntimeError in backward: it has no derivative.

    Source: per_token_quant_int8 of SGLang and vLLM, symmetric; vLLM's scaled_int8_quant has the zero point.
    """
    return PER_TOKEN_QUANT_INT8.call((x, symmetric), backend)


def _formula(x: Tensor, symmetric: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scale = torch.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    zero = torch.zeros_like(scale) if symmetric else (-low / scale).round() - 128
    return (x / scale.unsqueeze(-1)).round() + zero.unsqueeze(-1), scale, zero


def _half_a_scale(inputs: Arguments, actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], eager: object) -> list[str]:
    """x is x_scale * (x_q - x_zero) to half a scale, or one where the largest value is clamped to a step."""
    x, (x_q, x_scale, x_zero) = inputs["x"].double(), actual
    restored = (x_q.double() - x_zero.unsqueeze(-1)) * x_scale.double().unsqueeze(-1)
    reach = 0.5001 if inputs.get("symmetric", True) else 1.0001
    far = (restored - x).abs() > reach * truth[1].unsqueeze(-1)
    wrong = far.sum() + ((x_scale - truth[1]).abs() > 1e-6 * truth[1]).sum()
    return [f"{int(wrong)} elements or scales are not those of the nearest int8 values"] if wrong else []


register_inference_spec(
    OpSpec(
        per_token_quant_int8,
        OP,
        _formula,
        {
            "": lambda make: {"x": make.hidden_states()},
            "asymmetric": lambda make: {"x": make.hidden_states(), "symmetric": False},
        },
        _half_a_scale,
    )
)
