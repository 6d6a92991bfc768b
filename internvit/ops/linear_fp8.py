"""A Linear of float8_e4m3fn operands, with a scale for each token and each output channel, and the exact GELU of it.

    z = x_scale * weight_scale * (x_q weight_q^T) + bias,  y = z,  gelu(z)  or  residual + z

x_q [..., K] float8_e4m3fn, x_scale [...] float32; weight_q [M, K] float8_e4m3fn, weight_scale, bias [M] float32;
y, residual [..., M] bfloat16 or float32. Products are exact, sums and everything after them float32, and y is rounded
once. `per_token_quant` makes the operands: a weight's output channels are its rows.
"""

from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.numerics import product_violations
from internvit.ops.backends.registry import implements
from internvit.ops.core.quant_math import E4M3
from internvit.ops.core.registration import define
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Arguments, Inputs, OpSpec, register_inference_spec
from internvit.ops.linear_int8 import validate_quantized_linear
from internvit.ops.per_token_quant import per_token_quant

OP = "linear_fp8"


@implements(OP, "reference")
def linear_fp8_reference(
    x_q: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    y = F.linear(x_q.double(), weight_q.double()) * x_scale.double().unsqueeze(-1) * weight_scale.double()
    y = y if bias is None else y + bias.double()
    y = y if residual is None else y + residual.double()
    return (F.gelu(y) if gelu else y).to(dtype)


LINEAR_FP8 = define(
    f"{OP}(Tensor x_q, Tensor x_scale, Tensor weight_q, Tensor weight_scale, Tensor? bias, Tensor? residual, bool gelu,"
    " ScalarType dtype) -> Tensor y",
    fake=lambda x_q, x_scale, weight_q, weight_scale, bias, residual, gelu, dtype, backend: x_q.new_empty(
        (*x_q.shape[:-1], weight_q.shape[0]), dtype=dtype
    ),
    validate=lambda *args: validate_quantized_linear(OP, E4M3, *args),
    # Backends are listed by the floating dtypes that they take.
    choose=lambda args, asked: resolve(OP, args[1], asked),
    flops=lambda x_q, x_scale, weight_q, *_, **__: 2 * prod(x_q) * weight_q[0],
)


def linear_fp8(
    x_q: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    gelu: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    backend: str | None = None,
) -> Tensor:
    """A Linear of float8_e4m3fn operands with a scale for each token and each output channel.

    z = x_scale * weight_scale * (x_q weight_q^T) + bias,  y = z,  gelu(z)  or  residual + z

    Args:
        x_q: [..., K], float8_e4m3fn, any strides.
        x_scale: [...], float32.
        weight_q: [M, K], float8_e4m3fn.
        weight_scale: [M], float32; LayerScale may ride in it.
        bias: [M], float32, or None.
        residual: [..., M], `dtype`, added in float32 before y is rounded; or None. Not with gelu.
        gelu: whether y is the exact (erf) GELU of the Linear, in float32.
        dtype: of y, torch.bfloat16 or torch.float32.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], contiguous, rounded once.

    Raises:
        ValueError: a wrong shape, dtype or device. RuntimeError in backward: it has no derivative; or the GPU has no
            float8 products.
    """
    return LINEAR_FP8.call((x_q, x_scale, weight_q, weight_scale, bias, residual, gelu, dtype), backend)


def _formula(  # type: ignore[no-untyped-def]
    x_q, x_scale, weight_q, weight_scale, bias=None, residual=None, gelu=False, dtype=None
):
    x, weight = x_q.to(x_scale.dtype), weight_q.to(x_scale.dtype)
    y = F.linear(x * x_scale.unsqueeze(-1), weight * weight_scale.unsqueeze(-1), bias)
    y = y if residual is None else residual + y
    return F.gelu(y) if gelu else y


def _violations(inputs: Arguments, actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], _: object) -> list[str]:
    """In float32 a sum of K products rounds K times: at random about sqrt(K) roundings of its terms."""
    emulated = truth[0].to(actual[0].dtype)
    many = 4.0 * max(16, inputs["x_q"].shape[-1]) ** 0.5
    return product_violations(actual[0], truth[0], emulated, many if actual[0].dtype == torch.float32 else 1.1)


def _example(make: Inputs, **settings: object) -> Arguments:
    width, out = make.size.hidden_size, 2 * make.size.hidden_size + 1
    x_q, x_scale, _ = per_token_quant(make.hidden_states(), dtype=E4M3, backend="reference")
    weight_q, weight_scale, _ = per_token_quant(make.matrix(out, width), dtype=E4M3, backend="reference")
    operands = {"x_q": x_q, "x_scale": x_scale, "weight_q": weight_q, "weight_scale": weight_scale}
    return operands | {"bias": make.vector(length=out).float()} | settings


register_inference_spec(
    OpSpec(
        linear_fp8,
        OP,
        _formula,
        {
            "": _example,
            "gelu": lambda make: _example(make, gelu=True),
            "float32": lambda make: _example(make, dtype=torch.float32),
            "bias=None": lambda make: _example(make, bias=None),
            "residual": lambda make: _example(
                make, residual=make.hidden_states(2 * make.size.hidden_size + 1).bfloat16()
            ),
        },
        _violations,
    )
)
