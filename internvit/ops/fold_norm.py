"""A norm's weight and bias folded into the Linear behind it, for `norm_linear`.

    folded = weight * norm_weight (- its row's mean)
    folded_bias = bias + weight norm_bias,  weight_sum = sum of folded's columns

A row's mean is taken away for LayerNorm (`centred`): (x - mean) weight^T = x centred^T, in real numbers. What rounding
leaves of the mean is in `weight_sum`, which is of the weight as rounded.
"""

import torch
from torch import Tensor

from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, Inputs, OpSpec, register_inference_spec

OP = "fold_norm"


@implements(OP, "reference")
def fold_norm_reference(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    wide = weight.to(accumulate_dtype(weight))
    folded = wide * norm_weight
    if centred:
        folded = folded - folded.mean(-1, keepdim=True)
    folded = folded.to(weight.dtype).contiguous()
    folded_bias = wide.new_zeros(weight.shape[0]) if bias is None else bias.to(wide.dtype, copy=True)
    if norm_bias is not None:
        folded_bias = folded_bias + (wide * norm_bias).sum(-1)
    return folded, folded_bias, folded.to(wide.dtype).sum(-1)


def _validate(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor | None, centred: bool
) -> None:
    if weight.dim() != 2 or weight.shape[1] == 0:
        raise ValueError(f"{OP}: weight must have shape [M, C], got {check.shape_of(weight)}")
    check.floating(OP, weight=weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check.device(OP, "weight", weight, bias=bias, norm_weight=norm_weight, norm_bias=norm_bias)
    check.vector(OP, "bias", bias, weight.shape[0], "weight's rows")
    check.vector(OP, "norm_weight", norm_weight, weight.shape[1], "weight's columns")
    check.vector(OP, "norm_bias", norm_bias, weight.shape[1], "weight's columns")


FOLD_NORM = define(
    f"{OP}(Tensor weight, Tensor? bias, Tensor norm_weight, Tensor? norm_bias, bool centred)"
    " -> (Tensor folded, Tensor folded_bias, Tensor weight_sum)",
    fake=lambda weight, *_: (
        weight.new_empty(weight.shape),
        *(weight.new_empty(weight.shape[0], dtype=accumulate_dtype(weight)) for _ in range(2)),
    ),
    validate=_validate,
)


def fold_norm(
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    centred: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight, bias and column sums that `norm_linear` takes instead of a norm and the Linear behind it.

    folded = weight * norm_weight (- its row's mean),  folded_bias = bias + weight norm_bias

    Args:
        weight: [M, C], of the Linear, float32, bfloat16, float16 or float64.
        bias: [M], of the Linear, or None.
        norm_weight: [C], of the norm.
        norm_bias: [C], of LayerNorm, or None.
        centred: True for LayerNorm.
        backend: overrides `internvit.backend`.

    Returns:
        folded: [M, C], weight's dtype, rounded once; folded_bias and weight_sum: [M] float32 (float64 for float64).

    Raises:
        ValueError: a wrong shape, dtype or device. RuntimeError in backward: it has no derivative.
    """
    folded, folded_bias, weight_sum = FOLD_NORM.call((weight, bias, norm_weight, norm_bias, centred), backend)
    return folded, folded_bias, weight_sum


def _formula(weight, bias, norm_weight, norm_bias=None, centred=False):  # type: ignore[no-untyped-def]
    folded = weight * norm_weight
    folded = folded - folded.mean(-1, keepdim=True) if centred else folded
    shift = weight.new_zeros(weight.shape[0]) if norm_bias is None else weight @ norm_bias
    return folded, shift if bias is None else shift + bias, folded.sum(-1)


def _violations(inputs: Arguments, actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], _: object) -> list[str]:
    """To a unit of the largest weight of the row, and of sums of C float32 terms; sums are of the weight as rounded."""
    folded, bias, weight_sum = (t.double() for t in actual)
    scale = truth[0].abs().amax(-1, keepdim=True)
    wide = (inputs["weight"].double() * inputs["norm_weight"].double()).abs().sum(-1)
    unit, small = torch.finfo(actual[0].dtype).eps, 16 * torch.finfo(torch.float32).eps
    violations = []
    if ((folded - truth[0]).abs() > unit * scale / 2 + small * wide[:, None]).any():
        violations.append("folded is not the rounded product")
    shift = inputs["weight"].double().abs().sum(-1) * (1 + (inputs.get("norm_bias") is not None) * 3)
    if ((bias - truth[1]).abs() > small * (shift + truth[1].abs())).any():
        violations.append("folded_bias")
    if ((weight_sum - folded.sum(-1)).abs() > small * folded.abs().sum(-1)).any():
        violations.append("weight_sum is not of the weight as rounded")
    return violations


def example(make: Inputs, layer_norm: bool) -> Arguments:
    width = make.size.hidden_size
    return {
        "weight": make.matrix(2 * width + 1, width),
        "bias": make.vector(length=2 * width + 1),
        "norm_weight": make.vector(1.0),
        "norm_bias": make.vector() if layer_norm else None,
        "centred": layer_norm,
    }


register_inference_spec(
    OpSpec(
        fold_norm,
        OP,
        _formula,
        {
            "rms_norm": lambda make: example(make, False),
            "layer_norm": lambda make: example(make, True),
            "bias=None": lambda make: {**example(make, True), "bias": None},
        },
        _violations,
    )
)
