"""The exact GELU with its output quantised to int8 or float8 in the same pass: the operand of the MLP's second Linear.

    y = z / 2 * (1 + erf(z / sqrt(2)))
    x_q, x_scale, x_zero = per_token_quant(y)

z [..., C] of dtype T (float32, bfloat16, float16, float64). y is quantised from float32 and never rounded to T: the
same bits as `gelu` of z in float32 followed by `per_token_quant`. A GELU's output hardly goes below 0: with a zero
point it has twice the resolution.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.ops.backends.registry import implements
from internvit.ops.core import quant_math as quant
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, OpSpec, register_inference_spec
from internvit.ops.gelu import gelu_reference

OP = "gelu_quant"


@implements(OP, "reference")
def gelu_quant_reference(pre_activation: Tensor, symmetric: bool, dtype: torch.dtype) -> quant.Quantized:
    y = gelu_reference(pre_activation.to(accumulate_dtype(pre_activation)))
    return quant.quantize_rows(y, symmetric, dtype)


def _validate(pre_activation: Tensor, symmetric: bool, dtype: torch.dtype) -> None:
    check.rows(OP, "pre_activation", pre_activation)
    check.floating(OP, pre_activation=pre_activation)
    quant.validate(OP, symmetric, dtype)


GELU_QUANT = define(
    f"{OP}(Tensor pre_activation, bool symmetric, ScalarType dtype) -> ({quant.OUTPUTS})",
    fake=lambda pre_activation, symmetric, dtype, backend: quant.fake(pre_activation, dtype),
    validate=_validate,
    compiled=("cpu", "cuda"),
)


def gelu_quant(
    pre_activation: Tensor, *, symmetric: bool = False, dtype: torch.dtype = torch.int8, backend: str | None = None
) -> quant.Quantized:
    """The exact (erf) GELU, quantised to int8 or float8 with a scale for each row.

    x_q, x_scale, x_zero = per_token_quant(z / 2 * (1 + erf(z / sqrt(2))))

    Args:
        pre_activation: z [..., C], float32, bfloat16, float16 or float64.
        symmetric: as in `per_token_quant`, but False by default. True for float8.
        dtype: torch.int8 or torch.float8_e4m3fn.
        backend: overrides `internvit.backend`.

    Returns:
        x_q: [..., C], `dtype`, contiguous; x_scale: [...], float32; x_zero: [...], int32. As `per_token_quant` of
        `gelu` in float32.

    Raises:
        ValueError: a wrong shape, dtype or choice. RuntimeError in backward: it has no derivative.
    """
    return GELU_QUANT.call((pre_activation, symmetric, dtype), backend)


def _formula(pre_activation: Tensor, symmetric: bool = False, dtype: torch.dtype = torch.int8) -> quant.Quantized:
    return quant.formula(F.gelu(pre_activation), symmetric, dtype)


def _violations(inputs: Arguments, actual: quant.Quantized, truth: object, eager: object) -> list[str]:
    z = inputs["pre_activation"].double()
    exact = F.gelu(z)
    # erf in float32, PyTorch's too, is off by up to two units in the last place of 1: no less in 1 + erf.
    error = 1e-6 * exact.abs() + torch.finfo(torch.float32).eps * z.abs()
    return quant.violations(actual, exact, inputs.get("symmetric", False), error)


register_inference_spec(
    OpSpec(
        gelu_quant,
        OP,
        _formula,
        {
            "": lambda make: {"pre_activation": make.hidden_states(4 * make.size.hidden_size)},
            "symmetric": lambda make: {
                "pre_activation": make.hidden_states(4 * make.size.hidden_size),
                "symmetric": True,
            },
            "float8": lambda make: {
                "pre_activation": make.hidden_states(4 * make.size.hidden_size),
                "symmetric": True,
                "dtype": quant.E4M3,
            },
        },
        _violations,  # type: ignore[arg-type]
    )
)
