"""A Linear of int8 operands, with a scale for each token and each output channel, and the exact GELU of it.

    z = x_scale * weight_scale * ((x_q - x_zero) weight_q^T) + bias,  y = z,  gelu(z)  or  residual + z

x_q [..., K] int8, x_scale [...] float32, x_zero [...] int32; weight_q [M, K] int8, weight_scale, bias [M] float32;
y, residual [..., M] bfloat16 or float32. The sum is exact (int32), everything after it float32, and y is rounded once.
`per_token_quant` makes the operands: a weight's output channels are its rows.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.numerics import product_violations
from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.registration import define
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Arguments, Inputs, OpSpec, register_inference_spec
from internvit.ops.per_token_quant import per_token_quant

OP = "linear_int8"
DEEPEST = 65536
"""The most input features whose products still add up in int32 with one operand unsigned."""


@implements(OP, "reference")
def linear_int8_reference(
    x_q: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    centred = x_q.double() if x_zero is None else x_q.double() - x_zero.unsqueeze(-1)
    y = F.linear(centred, weight_q.double()) * x_scale.double().unsqueeze(-1) * weight_scale.double()
    y = y if bias is None else y + bias.double()
    if residual is not None:
        y = y + residual.double()
    return (F.gelu(y) if gelu else y).to(dtype)


def validate_quantized_linear(
    op: str,
    quantized: torch.dtype,
    x_q: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> None:
    """For Linears of operands of the dtype `quantized`."""
    check.rows(op, "x_q", x_q)
    for name, t in (("x_q", x_q), ("weight_q", weight_q)):
        if t.dtype != quantized:
            raise ValueError(f"{op}: {name} must be {str(quantized).removeprefix('torch.')}, got {t.dtype}")
    check.device(op, "x_q", x_q, x_scale=x_scale, weight_q=weight_q, weight_scale=weight_scale)
    check.device(op, "x_q", x_q, bias=bias, residual=residual)
    if weight_q.dim() != 2 or weight_q.shape[1] != x_q.shape[-1]:
        raise ValueError(
            f"{op}: weight_q must have shape [M, {x_q.shape[-1]}] (x_q's last dimension), got {list(weight_q.shape)}"
        )
    _rows(op, x_q, x_scale=x_scale)
    check.vector(op, "weight_scale", weight_scale, weight_q.shape[0], "weight_q's rows")
    check.vector(op, "bias", bias, weight_q.shape[0], "weight_q's rows")
    for name, scale in (("x_scale", x_scale), ("weight_scale", weight_scale), ("bias", bias)):
        if scale is not None and scale.dtype != torch.float32:
            raise ValueError(f"{op}: {name} must be float32, got {scale.dtype}")
    if dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"{op}: dtype must be torch.bfloat16 or torch.float32, got {dtype}")
    if residual is None:
        return
    shape = [*x_q.shape[:-1], weight_q.shape[0]]
    if list(residual.shape) != shape or residual.dtype != dtype:
        given = f"{check.shape_of(residual)} and {residual.dtype}"
        raise ValueError(f"{op}: residual must have the output's shape {shape} and dtype {dtype}, got {given}")
    if gelu:
        raise ValueError(f"{op}: residual must be None where gelu is True")


def _rows(op: str, x_q: Tensor, **tensors: Tensor | None) -> None:
    rows = x_q.shape[:-1]
    for name, t in tensors.items():
        if t is not None and t.shape != rows:
            raise ValueError(f"{op}: {name} must have shape {list(rows)} (x_q's rows), got {list(t.shape)}")


def _validate(
    x_q: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    *others: Any,
) -> None:
    validate_quantized_linear(OP, torch.int8, x_q, x_scale, weight_q, weight_scale, bias, *others)
    if x_q.shape[-1] > DEEPEST:
        raise ValueError(f"{OP}: x_q must have at most {DEEPEST} input features, got {x_q.shape[-1]}")
    check.device(OP, "x_q", x_q, x_zero=x_zero)
    _rows(OP, x_q, x_zero=x_zero)
    if x_zero is not None and x_zero.dtype != torch.int32:
        raise ValueError(f"{OP}: x_zero must be int32, got {x_zero.dtype}")


LINEAR_INT8 = define(
    f"{OP}(Tensor x_q, Tensor x_scale, Tensor weight_q, Tensor weight_scale, Tensor? bias, Tensor? x_zero,"
    " Tensor? residual, bool gelu, ScalarType dtype) -> Tensor y",
    fake=lambda x_q, x_scale, weight_q, weight_scale, bias, x_zero, residual, gelu, dtype, backend: x_q.new_empty(
        (*x_q.shape[:-1], weight_q.shape[0]), dtype=dtype
    ),
    validate=_validate,
    # Backends are listed by the floating dtypes that they take.
    choose=lambda args, asked: resolve(OP, args[1], asked),
    flops=lambda x_q, x_scale, weight_q, *_, **__: 2 * prod(x_q) * weight_q[0],
)


def linear_int8(
    x_q: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    x_zero: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    gelu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """A Linear of int8 operands with a scale for each token and each output channel.

    z = x_scale * weight_scale * ((x_q - x_zero) weight_q^T) + bias,  y = z,  gelu(z)  or  residual + z

    Args:
        x_q: [..., K], int8, any strides; K at most 65536.
        x_scale: [...], float32.
        weight_q: [M, K], int8.
        weight_scale: [M], float32; LayerScale may ride in it.
        bias: [M], float32, or None.
        x_zero: [...], int32 in -128 to 127, or None for zeros.
        residual: [..., M], `dtype`, added in float32 before y is rounded; or None. Not with gelu.
        gelu: whether y is the exact (erf) GELU of the Linear, in float32.
        dtype: of y, torch.bfloat16 or torch.float32.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], contiguous, rounded once.

    Raises:
        ValueError: a wrong shape, dtype or device. RuntimeError in backward: it has no derivative.
    """
    return LINEAR_INT8.call((x_q, x_scale, weight_q, weight_scale, bias, x_zero, residual, gelu, dtype), backend)


def _formula(  # type: ignore[no-untyped-def]
    x_q, x_scale, weight_q, weight_scale, bias=None, x_zero=None, residual=None, gelu=False, dtype=None
):
    x = x_q if x_zero is None else x_q - x_zero.unsqueeze(-1)
    y = F.linear(x * x_scale.unsqueeze(-1), weight_q * weight_scale.unsqueeze(-1), bias)
    y = y if residual is None else residual + y
    return F.gelu(y) if gelu else y


def _rounds_the_exact_sum(inputs: Arguments, actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], _: object) -> list:
    emulated = truth[0].to(actual[0].dtype)
    return product_violations(actual[0], truth[0], emulated, 8.0 if actual[0].dtype == torch.float32 else 1.1)


def _residual(make: Inputs) -> Tensor:
    return make.hidden_states(2 * make.size.hidden_size + 1).bfloat16()


def _example(make: Inputs, **settings: object) -> Arguments:
    width, out = make.size.hidden_size, 2 * make.size.hidden_size + 1
    x_q, x_scale, x_zero = per_token_quant(make.hidden_states(), symmetric=False, backend="reference")
    weight_q, weight_scale, _ = per_token_quant(make.matrix(out, width), backend="reference")
    operands = {"x_q": x_q, "x_scale": x_scale, "weight_q": weight_q, "weight_scale": weight_scale, "x_zero": x_zero}
    return operands | {"bias": make.vector(length=out).float()} | settings


register_inference_spec(
    OpSpec(
        linear_int8,
        OP,
        _formula,
        {
            "": _example,
            "gelu": lambda make: _example(make, gelu=True),
            "float32": lambda make: _example(make, dtype=torch.float32),
            "bias=None, x_zero=None": lambda make: _example(make, bias=None, x_zero=None),
            "residual": lambda make: _example(make, residual=_residual(make)),
        },
        _rounds_the_exact_sum,
    )
)
