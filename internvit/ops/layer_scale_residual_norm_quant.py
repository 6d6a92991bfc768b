"""`layer_scale_residual_norm` with the normed row quantised to int8 or float8 in the same pass.

    residual_out = residual + row_scale[b] * gamma * branch
    x_q, x_scale, x_zero = per_token_quant(norm(residual_out) * weight (+ bias))

Reads two [B, ..., C] tensors and writes one and a row of bytes. The statistics are those of residual_out as rounded to
its dtype; the normed row is quantised from float32 and never rounded before: on CPUs the same bits as
`layer_scale_residual`, the norm of that in float32 and `per_token_quant`, on GPUs but for the order of a row's sum.
"""

from typing import Any

import torch
from torch import Tensor

from internvit.numerics import layer_norm_terms
from internvit.ops.backends.registry import implements
from internvit.ops.core import quant_math as quant
from internvit.ops.core.norm_math import accumulate_dtype, scale_and_shift, standardize, statistics
from internvit.ops.core.registration import define
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Arguments, OpSpec, register_inference_spec, widened
from internvit.ops.layer_scale_residual import formula as residual_formula
from internvit.ops.layer_scale_residual import layer_scale_residual_reference, residual_violations
from internvit.ops.layer_scale_residual_norm import example, norm_formula, validate_fused_norm

OP = "layer_scale_residual_norm_quant"


@implements(OP, "reference")
def layer_scale_residual_norm_quant_reference(  # type: ignore[no-untyped-def]
    residual, branch, gamma, row_scale, weight, bias, eps, norm_type, symmetric, dtype
):
    residual_out = layer_scale_residual_reference(residual, branch, gamma, row_scale)
    mean, rstd = statistics(residual_out, norm_type, eps)
    x_hat = standardize(residual_out, mean, rstd, norm_type)
    normed = scale_and_shift(x_hat, weight, bias, accumulate_dtype(x_hat), "fused")
    return residual_out, *quant.quantize_rows(normed, symmetric, dtype)


def _validate(*args: Any) -> None:
    *norm, symmetric, dtype = args
    validate_fused_norm(OP, *norm)
    quant.validate(OP, symmetric, dtype)


def _fake(residual: Tensor, *others: Any) -> tuple[Tensor, ...]:
    dtype, _ = others[-2:]
    return residual.new_empty(residual.shape), *quant.fake(residual, dtype)


LAYER_SCALE_RESIDUAL_NORM_QUANT = define(
    f"{OP}(Tensor residual, Tensor branch, Tensor? gamma, Tensor? row_scale, Tensor weight, Tensor? bias, float eps,"
    f" str norm_type, bool symmetric, ScalarType dtype) -> (Tensor residual_out, {quant.OUTPUTS})",
    fake=_fake,
    validate=_validate,
    choose=lambda args, asked: resolve(OP, args[1], asked),
    compiled=("cpu", "cuda"),
)


def layer_scale_residual_norm_quant(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gamma: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm_type: str = "rms_norm",
    symmetric: bool = True,
    dtype: torch.dtype = torch.int8,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adds a branch to the residual stream, normalises the sum and quantises it with a scale for each row, in one pass.

    residual_out = residual + row_scale[b] * gamma * branch
    x_q, x_scale, x_zero = per_token_quant(rms_norm(residual_out, weight)  or  layer_norm(residual_out, weight, bias))

    Args:
        residual: [B, ..., C], branch's dtype or float32.
        branch: [B, ..., C], float32, bfloat16, float16 or float64.
        weight: [C], of the norm, branch's dtype or float32.
        bias: [C], weight's dtype; LayerNorm only.
        gamma: [C], LayerScale; None where it is folded into the GEMM before.
        row_scale: [B] float32, a factor per image.
        eps: of the norm.
        norm_type: "rms_norm" or "layer_norm".
        symmetric, dtype: of the quantisation, as in `per_token_quant`.
        backend: overrides `internvit.backend`.

    Returns:
        residual_out: [B, ..., C], residual's dtype; x_q: [B, ..., C], `dtype`; x_scale: [B, ...], float32; x_zero:
        [B, ...], int32. As `layer_scale_residual`, the norm of that in float32 and `per_token_quant`.

    Raises:
        ValueError: a wrong shape, dtype, device or choice. RuntimeError in backward: it has no derivative.
    """
    args = (residual, branch, gamma, row_scale, weight, bias, eps, norm_type, symmetric, dtype)
    return LAYER_SCALE_RESIDUAL_NORM_QUANT.call(args, backend)


def _formula(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Any = None,
    gamma: Any = None,
    row_scale: Any = None,
    norm_type: str = "rms_norm",
    eps: float = 1e-6,
    **quantization: Any,
) -> tuple[Tensor, ...]:
    out = residual_formula(residual, branch, gamma, row_scale)
    return out, *quant.formula(norm_formula(out, weight, bias, norm_type, eps), **quantization)


def _violations(inputs: Arguments, actual: tuple[Tensor, ...], truth: Any, eager: Any) -> list[str]:
    """The norm is that of residual_out as rounded to its dtype."""
    out, x_q, x_scale, x_zero = actual
    weight, bias = (widened(inputs)[n] for n in ("weight", "bias"))
    exact = norm_formula(out.double(), weight, bias, inputs["norm_type"], inputs.get("eps", 1e-6))
    terms = exact.abs()
    if inputs["norm_type"] == "layer_norm":
        terms = layer_norm_terms(out, weight, torch.zeros_like(weight) if bias is None else bias)
    symmetric = inputs.get("symmetric", True)
    return residual_violations(inputs, out) + quant.violations(
        (x_q, x_scale, x_zero), exact, symmetric, quant.NORM_ERROR * terms
    )


register_inference_spec(
    OpSpec(
        layer_scale_residual_norm_quant,
        OP,
        _formula,
        quant.variants(
            {
                "rms_norm": lambda make: example(make, "rms_norm"),
                "layer_norm": lambda make: example(make, "layer_norm"),
            }
        ),
        _violations,
    )
)
