"""int8 or float8 quantisation of each row: the operands of `linear_int8` and `linear_fp8`.

    int8, symmetric:  x_scale = max |x| / 127,  x_zero = 0
    int8, else:       x_scale = (high - low) / 255,  x_zero = round(-low / x_scale) - 128
    float8_e4m3fn:    x_scale = max |x| / 448,  x_zero = 0
    x_q = round(x / x_scale) + x_zero,  low = min(x, 0),  high = max(x, 0)

x is x_scale * (x_q - x_zero) to half a step.
x [..., K] of dtype T (float32, bfloat16, float16, float64); x_q [..., K] int8 or float8_e4m3fn; x_scale [...] float32;
x_zero [...] int32.
"""

import torch
from torch import Tensor

from internvit.ops.backends.registry import implements
from internvit.ops.core import quant_math as quant
from internvit.ops.core import validation as check
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, OpSpec, register_inference_spec

OP = "per_token_quant"


@implements(OP, "reference")
def per_token_quant_reference(x: Tensor, symmetric: bool, dtype: torch.dtype) -> quant.Quantized:
    return quant.quantize_rows(x, symmetric, dtype)


def _validate(x: Tensor, symmetric: bool, dtype: torch.dtype) -> None:
    check.rows(OP, "x", x)
    check.floating(OP, x=x)
    quant.validate(OP, symmetric, dtype)


PER_TOKEN_QUANT = define(
    f"{OP}(Tensor x, bool symmetric, ScalarType dtype) -> ({quant.OUTPUTS})",
    fake=lambda x, symmetric, dtype, backend: quant.fake(x, dtype),
    validate=_validate,
    compiled=("cpu", "cuda"),
)


def per_token_quant(
    x: Tensor, *, symmetric: bool = True, dtype: torch.dtype = torch.int8, backend: str | None = None
) -> quant.Quantized:
    """Quantises each row to int8 or float8, with a scale and a zero point of its own.

    x_q = round(x / x_scale) + x_zero, to nearest even

    Args:
        x: [..., K], float32, bfloat16, float16 or float64, any strides.
        symmetric: scales by max |x| / 127 with a zero point of 0, for weights; otherwise by the range from min(x, 0) to
            max(x, 0) over 255, which has twice the resolution for a GELU's output. Always True for float8.
        dtype: torch.int8 or torch.float8_e4m3fn, which is scaled by max |x| / 448.
        backend: overrides `internvit.backend`.

    Returns:
        x_q: [..., K], `dtype`, contiguous.
        x_scale: [...], float32. 0 for rows of a range below 1e-30, NaN for rows with a value that is not finite.
        x_zero: [...], int32, in -128 to 127; x is x_scale * (x_q - x_zero) to half a step. 0 where symmetric.

    Raises:
        ValueError: a wrong shape, dtype or choice. RuntimeError in backward: it has no derivative.

    Source: per_token_quant_int8 and per_token_quant_fp8 of SGLang, symmetric; vLLM's scaled_int8_quant has the zero
    point.
    """
    return PER_TOKEN_QUANT.call((x, symmetric, dtype), backend)


def _violations(inputs: Arguments, actual: quant.Quantized, truth: object, eager: object) -> list[str]:
    return quant.violations(actual, inputs["x"].double(), inputs.get("symmetric", True))


register_inference_spec(
    OpSpec(
        per_token_quant,
        OP,
        quant.formula,
        quant.variants({"": lambda make: {"x": make.hidden_states()}}),
        _violations,  # type: ignore[arg-type]
    )
)
