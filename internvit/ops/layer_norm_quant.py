"""LayerNorm with its output quantised to int8 or float8 in the same pass: the operand of the Linear behind the norm.

    y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var(x) + eps),  over the last dimension C
    x_q, x_scale, x_zero = per_token_quant(y)

x [..., C] of dtype T (float32, bfloat16, float16, float64), any strides; weight, bias [C], T or float32. y is quantised
from float32 and never rounded to T: on CPUs the same bits as `layer_norm` of x in float32 followed by
`per_token_quant`, on GPUs but for the order in which a row is summed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.numerics import layer_norm_terms
from internvit.ops.backends.registry import implements
from internvit.ops.core import quant_math as quant
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, OpSpec, register_inference_spec, widened
from internvit.ops.layer_norm import layer_norm_reference, validate_layer_norm

OP = "layer_norm_quant"


@implements(OP, "reference")
def layer_norm_quant_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, symmetric: bool, dtype: torch.dtype
) -> quant.Quantized:
    normed, _, _ = layer_norm_reference(x.to(accumulate_dtype(x)).contiguous(), weight, bias, eps)
    return quant.quantize_rows(normed, symmetric, dtype)


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, symmetric: bool, dtype: torch.dtype) -> None:
    validate_layer_norm(OP, x, weight, bias, eps)
    quant.validate(OP, symmetric, dtype)


LAYER_NORM_QUANT = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, float eps, bool symmetric, ScalarType dtype) -> ({quant.OUTPUTS})",
    fake=lambda x, weight, bias, eps, symmetric, dtype, backend: quant.fake(x, dtype),
    validate=_validate,
    compiled=("cpu", "cuda"),
)


def layer_norm_quant(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    symmetric: bool = True,
    dtype: torch.dtype = torch.int8,
    backend: str | None = None,
) -> quant.Quantized:
    """LayerNorm over the last dimension, quantised to int8 or float8 with a scale for each row.

    x_q, x_scale, x_zero = per_token_quant((x - mean(x)) / sqrt(var(x) + eps) * weight + bias)

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, any strides.
        weight: [C], x's dtype or float32.
        bias: [C], weight's dtype, or None.
        eps: added to the (biased) variance.
        symmetric, dtype: of the quantisation, as in `per_token_quant`.
        backend: overrides `internvit.backend`.

    Returns:
        x_q: [..., C], `dtype`, contiguous; x_scale: [...], float32; x_zero: [...], int32. As `per_token_quant` of
        `layer_norm` in float32.

    Raises:
        ValueError: a wrong shape, dtype, device or choice. RuntimeError in backward: it has no derivative.
    """
    return LAYER_NORM_QUANT.call((x, weight, bias, eps, symmetric, dtype), backend)


def _formula(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6, **quantization: Any
) -> quant.Quantized:
    return quant.formula(F.layer_norm(x, weight.shape, weight, bias, eps), **quantization)


def _violations(inputs: Arguments, actual: quant.Quantized, truth: object, eager: object) -> list[str]:
    x, weight, bias = (widened(inputs)[n] for n in ("x", "weight", "bias"))
    exact = F.layer_norm(x, weight.shape, weight, bias, inputs.get("eps", 1e-6))
    terms = layer_norm_terms(x, weight, torch.zeros_like(weight) if bias is None else bias)
    return quant.violations(actual, exact, inputs.get("symmetric", True), quant.NORM_ERROR * terms)


register_inference_spec(
    OpSpec(
        layer_norm_quant,
        OP,
        _formula,
        quant.variants(
            {"": lambda make: {"x": make.hidden_states(), "weight": make.vector(1.0), "bias": make.vector()}}
        )
        | {"bias=None": lambda make: {"x": make.hidden_states(), "weight": make.vector(1.0), "bias": None}},
        _violations,  # type: ignore[arg-type]
    )
)
