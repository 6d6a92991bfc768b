"""A norm and the Linear behind it as one GEMM of the stream itself, for inference.

    y = rstd * (x weight^T - mean * weight_sum) + bias,  or gelu of that

The weight, the bias and the column sums are those of `fold_norm`; mean and rstd are of x's rows, as
`linear_residual_stats` returns them. The normed rows exist nowhere: a pass over memory less to write them, and one to
read the stream for them. Sums are float32; y is rounded once, and what GELU is taken of before it.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.numerics import product_violations, relative_error
from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, statistics
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, Inputs, OpSpec, register_inference_spec, widened
from internvit.ops.fold_norm import fold_norm_reference
from internvit.ops.linear import linear

OP = "norm_linear"


@implements(OP, "reference")
def norm_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_sum: Tensor | None,
    gelu: bool,
) -> Tensor:
    dtype = accumulate_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = linear(x.to(dtype), weight.to(dtype), None, "reference")
    if mean is not None and weight_sum is not None:
        y = y - mean.unsqueeze(-1) * weight_sum
    y = y * rstd.unsqueeze(-1)
    y = (y if bias is None else y + bias).to(x.dtype)
    return (F.gelu(y) if gelu else y).contiguous()


def validate_normed_operands(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_sum: Tensor | None,
) -> None:
    """For the ops whose arguments begin as this one's."""
    check.rows(op, "x", x)
    check.floating(op, x=x, weight=weight, bias=bias, weight_sum=weight_sum)
    check.device(op, "x", x, weight=weight, bias=bias, weight_sum=weight_sum)
    check.linear_weight(op, x, weight)
    check.same_dtype(op, "x", x, weight=weight)
    check.vector(op, "bias", bias, weight.shape[0], "weight's rows")
    check.leading(op, "x", x, x.dim() - 1, "rows", rstd=rstd, mean=mean)
    if (mean is None) != (weight_sum is None):
        absent = "mean" if mean is None else "weight_sum"
        raise ValueError(f"{op}: mean and weight_sum go together, got None for {absent}")
    check.vector(op, "weight_sum", weight_sum, weight.shape[0], "weight's rows")


NORM_LINEAR = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor rstd, Tensor? mean, Tensor? weight_sum, bool gelu)"
    " -> Tensor y",
    fake=lambda x, weight, *_: x.new_empty((*x.shape[:-1], weight.shape[0])),
    validate=lambda *args: validate_normed_operands(OP, *args[:-1]),
    flops=lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
)


def norm_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None = None,
    weight_sum: Tensor | None = None,
    *,
    gelu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A norm folded into the Linear behind it, for inference.

    y = rstd * (x weight^T - mean * weight_sum) + bias,  or gelu of that

    Args:
        x: [..., K], float32, bfloat16, float16 or float64: what the norm is of.
        weight: [M, K], x's dtype; weight, bias and weight_sum are those of `fold_norm`.
        bias: [M], or None.
        rstd: [...], float32.
        mean: [...], float32, of LayerNorm; None for RMSNorm.
        weight_sum: [M], float32, with mean.
        gelu: whether y is the exact (erf) GELU of the Linear, as rounded.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], x's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype or device. RuntimeError in backward: it has no derivative.
    """
    return NORM_LINEAR.call((x, weight, bias, rstd, mean, weight_sum, gelu), backend)


def _linear(x: Tensor, weight: Tensor, bias: Any, rstd: Tensor, mean: Any = None, weight_sum: Any = None) -> Tensor:
    y = F.linear(x, weight)
    y = y if mean is None else y - mean.unsqueeze(-1) * weight_sum
    y = y * rstd.unsqueeze(-1)
    return y if bias is None else y + bias


def _formula(*args: Any, gelu: bool = False, **named: Any) -> Tensor:
    y = _linear(*args, **named)
    return F.gelu(y) if gelu else y


def sums_violations(arguments: Arguments, actual: Tensor, truth: Tensor) -> list[str]:
    """16 bit: one rounding of the exact y, two with GELU. float32: as good as eager's sums, which cancel as much."""
    if actual.dtype == torch.float32:
        allowed = 4 * max(relative_error(_formula(**arguments), truth), 16 * torch.finfo(torch.float32).eps)
        error = relative_error(actual, truth)
        return [] if error <= allowed else [f"relative error {error:.2e}, allowed {allowed:.2e}"]
    gelu = arguments.get("gelu", False)
    z = _formula(**widened({**arguments, "gelu": False})).to(actual.dtype)
    return product_violations(actual, truth, F.gelu(z.double()).to(actual.dtype) if gelu else z)


def example(make: Inputs, norm_type: str, out: int | None = None, **settings: Any) -> Arguments:
    width, layer_norm = make.size.hidden_size, norm_type == "layer_norm"
    x, out = make.hidden_states(), 2 * width + 1 if out is None else out
    parameters = make.matrix(out, width), make.vector(length=out), make.vector(1.0), make.vector()
    weight, bias, weight_sum = fold_norm_reference(*parameters, layer_norm)
    mean, rstd = statistics(x, norm_type, 1e-6)
    of_mean = {"mean": mean, "weight_sum": weight_sum} if layer_norm else {}
    return {"x": x, "weight": weight, "bias": bias, "rstd": rstd, **of_mean, **settings}


register_inference_spec(
    OpSpec(
        norm_linear,
        OP,
        _formula,
        {
            "rms_norm": lambda make: example(make, "rms_norm"),
            "layer_norm": lambda make: example(make, "layer_norm"),
            "layer_norm, gelu": lambda make: example(make, "layer_norm", gelu=True),
            "bias=None": lambda make: example(make, "rms_norm", bias=None),
        },
        lambda arguments, actual, truth, _: sums_violations(arguments, actual[0], truth[0]),
    )
)
