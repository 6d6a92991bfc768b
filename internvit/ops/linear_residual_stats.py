"""A branch's last Linear with LayerScale and the residual, and the statistics of the next norm, for inference.

    y = residual + gamma * (x weight^T + bias),  mean and rstd of y's rows as rounded

`linear_layer_scale` with a residual, and what `norm_linear` needs of its output: a GEMM that has y in its registers
does not read it again for them.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.numerics import product_violations
from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, statistics
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, Inputs, OpSpec, register_inference_spec
from internvit.ops.linear import linear

OP = "linear_residual_stats"


@implements(OP, "reference")
def linear_residual_stats_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, residual: Tensor, eps: float, norm_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulate_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        y = linear(x.to(dtype), weight.to(dtype), None)
    y = y if bias is None else y + bias
    y = (residual + (y if gamma is None else y * gamma)).to(residual.dtype).contiguous()
    return y, *statistics(y, norm_type, eps)


def _validate(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None, residual: Tensor, eps: float, norm_type: str
) -> None:
    check.rows(OP, "x", x)
    check.floating(OP, x=x, weight=weight, bias=bias, gamma=gamma)
    check.device(OP, "x", x, weight=weight, bias=bias, gamma=gamma, residual=residual)
    check.linear_weight(OP, x, weight)
    check.same_dtype(OP, "x", x, weight=weight, residual=residual)
    if weight.shape[0] == 0:
        raise ValueError(f"{OP}: weight must have at least one row, got shape {check.shape_of(weight)}")
    check.vector(OP, "bias", bias, weight.shape[0], "weight's rows")
    check.vector(OP, "gamma", gamma, weight.shape[0], "weight's rows")
    shape = [*x.shape[:-1], weight.shape[0]]
    if list(residual.shape) != shape:
        raise ValueError(f"{OP}: residual must have shape {shape}, got {check.shape_of(residual)}")
    check.eps(OP, eps)
    check.choice(OP, "norm_type", norm_type, check.NORM_TYPES)


def _fake(x, weight, bias, gamma, residual, eps, norm_type, backend):  # type: ignore[no-untyped-def]
    rows, dtype = x.shape[:-1], accumulate_dtype(x)
    mean = x.new_empty(rows if norm_type == "layer_norm" else (0,), dtype=dtype)
    return residual.new_empty(residual.shape), mean, x.new_empty(rows, dtype=dtype)


LINEAR_RESIDUAL_STATS = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor? gamma, Tensor residual, float eps, str norm_type)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=_fake,
    validate=_validate,
    flops=lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
)


def linear_residual_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor,
    *,
    eps: float = 1e-6,
    norm_type: str = "rms_norm",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A Linear with LayerScale and the residual, and the statistics of the norm that follows, for inference.

    y = residual + gamma * (x weight^T + bias)

    Args:
        x: [..., K], float32, bfloat16, float16 or float64.
        weight: [M, K], x's dtype.
        bias: [M], or None.
        gamma: [M], LayerScale, or None.
        residual: [..., M], x's dtype.
        eps: of the norm.
        norm_type: "rms_norm" or "layer_norm".
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], x's dtype, rounded once; mean: [...] of y as rounded, empty for RMSNorm; rstd: [...]. Both are
            float32 (float64 for float64 input), for `norm_linear`.

    Raises:
        ValueError: a wrong shape, dtype or device. RuntimeError in backward: it has no derivative.
    """
    args = (x, weight, bias, gamma, residual, eps, norm_type)
    y, mean, rstd = LINEAR_RESIDUAL_STATS.call(args, backend)
    return y, mean, rstd


def _formula(  # type: ignore[no-untyped-def]
    x, weight, bias, gamma, residual, eps=1e-6, norm_type="rms_norm"
):
    branch = F.linear(x, weight, bias)
    y = residual + (branch if gamma is None else branch * gamma)
    return y, *statistics(y, norm_type, eps)


def _violations(arguments: Arguments, actual: Any, truth: Any, _: object) -> list[str]:
    """The statistics are those of y as rounded."""
    y, mean, rstd = actual
    eps, norm_type = arguments.get("eps", 1e-6), arguments["norm_type"]
    factor = 64.0 if y.dtype == torch.float32 else None
    violations = product_violations(y, truth[0], truth[0].to(y.dtype), factor)
    exact_mean, exact_rstd = statistics(y.double(), norm_type, eps)
    if not torch.allclose(rstd.double(), exact_rstd, rtol=1e-5, atol=0):
        violations.append("rstd is not of the rounded rows")
    if norm_type == "layer_norm" and ((mean - exact_mean).abs() > 1e-5 * y.double().abs().mean(-1)).any():
        violations.append("mean is not of the rounded rows")
    return violations


def _example(make: Inputs, norm_type: str, **settings: Any) -> Arguments:
    width = make.size.hidden_size
    return {
        "x": make.branch(),
        "weight": make.matrix(width, width),
        "bias": make.vector(),
        "gamma": make.vector(0.5),
        "residual": make.hidden_states(),
        "norm_type": norm_type,
        **settings,
    }


register_inference_spec(
    OpSpec(
        linear_residual_stats,
        OP,
        _formula,
        {
            "rms_norm": lambda make: _example(make, "rms_norm"),
            "layer_norm": lambda make: _example(make, "layer_norm"),
            "bias=None, gamma=None": lambda make: _example(make, "layer_norm", bias=None, gamma=None),
        },
        _violations,
    )
)
