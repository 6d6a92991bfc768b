"""The first half of the MLP: a Linear and the exact GELU of it.

    y = gelu(pre_activation),  pre_activation = x weight^T + bias,  gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))

x [..., K] of dtype T; weight [M, K], bias [M] of dtype T; y, pre_activation [..., M]. GELU is taken of the
pre-activation as rounded to T, in float32: that is all backward keeps, and y can be rebuilt from it to the bit.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.ops.backends.registry import implementation, implements
from internvit.ops.core import validation as check
from internvit.ops.core.autocast import autocast_dtype, cast
from internvit.ops.core.norm_math import sum_rows
from internvit.ops.core.registration import Mask, define, define_backward, empty_grad
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Inputs, OpSpec, multiplies, register_spec
from internvit.ops.linear import linear, matmul

OP = "linear_gelu"


@implements(OP, "reference")
def linear_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool
) -> tuple[Tensor, Tensor | None]:
    pre_activation = linear(x, weight, bias, "reference")
    return F.gelu(pre_activation), pre_activation if save_pre_activation else None


def linear_then_gelu(
    backend: str, x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool
) -> tuple[Tensor, Tensor | None]:
    """`internvit.ops.linear` and a backend's own GELU: for the backends without a fused product."""
    pre_activation = linear(x, weight, bias, backend)
    return implementation("gelu", backend)(pre_activation), pre_activation if save_pre_activation else None


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool, backend: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, pre_activation = implementation(OP, backend)(x, weight, bias, save_pre_activation)
    return y, empty_grad(x) if pre_activation is None else pre_activation


def _run_backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, pre_activation: Tensor, output_mask: Mask, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad = implementation("gelu_backward", backend)(grad_y, pre_activation)
    grad_x, grad_weight, grad_bias = (empty_grad(grad) for _ in range(3))
    with torch.autocast(grad.device.type, enabled=False):
        if output_mask[0]:
            grad_x = matmul(grad, weight)
        if output_mask[1]:
            assert x is not None
            grad_weight = matmul(grad.flatten(0, -2).t(), x.flatten(0, -2)) if grad.dim() > 1 else torch.outer(grad, x)
        if output_mask[2]:
            grad_bias = sum_rows(grad)
    return grad_x, grad_weight, grad_bias if grad.dim() > 1 else grad_bias.clone()


def _fake(x, weight, bias, save_pre_activation, backend):  # type: ignore[no-untyped-def]
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape) if save_pre_activation else empty_grad(x)


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool) -> None:
    check.rows(OP, "x", x)
    check.floating(OP, x=x, weight=weight, bias=bias)
    check.device(OP, "x", x, weight=weight, bias=bias)
    check.linear_weight(OP, x, weight)
    check.vector(OP, "bias", bias, weight.shape[0], "weight's rows")
    check.same_dtype(OP, "x", x, **{n: t for n, t in (("weight", weight), ("bias", bias)) if t is not None})


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_y, x, weight, pre_activation, output_mask, backend
) -> None:
    op = f"{OP}_backward"
    check.output_mask(op, output_mask, 3)
    check.rows(op, "pre_activation", pre_activation)
    check.floating(op, pre_activation=pre_activation)
    check.like(op, "pre_activation", pre_activation, grad_y=grad_y)
    check.linear_backward(op, "pre_activation", pre_activation, x, weight, output_mask[1], pre_activation.dtype)
    check.same_dtype(op, "pre_activation", pre_activation, weight=weight)


def _like_x(named: dict[str, Any]) -> Tensor:
    grad_y = named["grad_y"]
    return grad_y.new_empty((*grad_y.shape[:-1], named["weight"].shape[1]))


LINEAR_GELU = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, bool save_pre_activation) -> (Tensor y, Tensor pre_activation)",
    fake=_fake,
    validate=_validate,
    run=_run,
    autocast=("x", "weight", "bias"),
    flops=lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
)
define_backward(
    LINEAR_GELU,
    f"{OP}_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor pre_activation, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    validate=_validate_backward,
    grads_like={"grad_x": _like_x, "grad_bias": lambda named: named["weight"][:, 0]},
    run=_run_backward,
    saved_for={"x": ("weight",)},
    when_differentiated={"save_pre_activation": True},
    flops=lambda grad_y, x, weight, pre, mask, *_, **__: 2 * prod(grad_y) * weight[1] * (bool(mask[0]) + bool(mask[1])),
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """A Linear and the exact (erf) GELU of it.

    y = gelu(x weight^T + bias)

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; under autocast cast as for torch's Linear.
        weight: [M, K], x's dtype.
        bias: [M], x's dtype, or None.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], x's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device.

    Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415; InternMLP in OpenGVLab's modeling_intern_vit.py.
    """
    return LINEAR_GELU.call((x, weight, bias, False), backend)[0]


def linear_gelu_with_pre_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None
) -> tuple[Tensor, Tensor, str]:
    """`linear_gelu`, the pre-activation [..., M], and the backend whose `gelu` of that gives the same bits again."""
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight, bias = cast(x, dtype), cast(weight, dtype), cast(bias, dtype)  # type: ignore[assignment]
    outputs = LINEAR_GELU.call((x, weight, bias, True), backend)
    return (*outputs, str(resolve(OP, x, backend)))  # resolved last: the call may have taken the next backend


def _example(make: Inputs) -> dict[str, Any]:
    hidden, intermediate = make.size.hidden_size, 4 * make.size.hidden_size
    return {
        "x": make.hidden_states(),
        "weight": make.matrix(intermediate, hidden),
        "bias": make.vector(length=intermediate),
    }


register_spec(
    OpSpec(
        linear_gelu,
        OP,
        lambda x, weight, bias=None: F.gelu(F.linear(x, weight, bias)),
        {"": _example, "bias=None": lambda make: {**_example(make), "bias": None}},
        multiplies,
        portable=lambda x, weight, bias, save_pre_activation: F.gelu(F.linear(x, weight, bias)),
    )
)
