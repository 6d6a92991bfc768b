"""The first half of the MLP: a Linear and the exact GELU of it.

    y = gelu(pre_activation),  pre_activation = x weight^T + bias,  gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))

x [..., K] of dtype T; weight [M, K], bias [M] of dtype T; y, pre_activation [..., M]. GELU is taken of the
pre-activation as rounded to T, in float32: that is all backward keeps, and y can be rebuilt from it to the bit.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from internvit.ops.attention import autocast
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import sum_rows
from internvit.ops.core.registration import Mask, below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import implementation, reference, resolve
from internvit.ops.linear import linear

OP = "linear_gelu"


@reference("gelu")
def gelu_reference(pre_activation: Tensor) -> Tensor:
    return F.gelu(pre_activation.contiguous())


@reference("gelu_backward")
def gelu_backward_reference(grad_y: Tensor, pre_activation: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad_y.contiguous(), pre_activation.contiguous())


@reference(OP)
def linear_gelu_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    pre_activation = linear(x, weight, bias)
    return F.gelu(pre_activation), pre_activation


def linear_then_gelu(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """PyTorch's Linear and a backend's own GELU: for the compiled libraries, which leave products to PyTorch."""
    pre_activation = linear(x, weight, bias)
    return implementation("gelu", backend)(pre_activation), pre_activation


class GeluFunction(Function):
    @staticmethod
    def forward(ctx: Any, pre_activation: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(pre_activation)
        ctx.backend = backend
        return below_autograd(GELU, pre_activation, backend)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return GELU_BACKWARD(grad_y, *ctx.saved_tensors, ctx.backend), None


class LinearGeluFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        y, pre_activation = below_autograd(LINEAR_GELU, x, weight, bias, True, backend)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, pre_activation)
        ctx.backend = backend
        ctx.mark_non_differentiable(pre_activation)
        ctx.set_materialize_grads(False)
        return y, pre_activation

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 5
        mask = ctx.needs_input_grad[:3]
        grads = LINEAR_GELU_BACKWARD(grad_y, *ctx.saved_tensors, mask, ctx.backend)
        return (*wanted(grads, mask), None, None)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool, backend: str
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, pre_activation = implementation(OP, backend)(x, weight, bias)
    return y, pre_activation if save_pre_activation else empty_grad(x)


def _run_backward(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, pre_activation: Tensor, output_mask: Mask, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad = implementation("gelu_backward", backend)(grad_y, pre_activation)
    grad_x, grad_weight, grad_bias = (empty_grad(grad) for _ in range(3))
    with torch.autocast(grad.device.type, enabled=False):
        if output_mask[0]:
            grad_x = grad @ weight
        if output_mask[1]:
            assert x is not None
            grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if grad.dim() > 1 else torch.outer(grad, x)
        if output_mask[2]:
            grad_bias = sum_rows(grad)
    return grad_x, grad_weight, grad_bias if grad.dim() > 1 else grad_bias.clone()


def _fake_forward(  # type: ignore[no-untyped-def]
    x, weight, bias, save_pre_activation, backend
):
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape) if save_pre_activation else empty_grad(x)


def _fake_backward(grad_y, x, weight, pre_activation, output_mask, backend):  # type: ignore[no-untyped-def]
    shapes = ((*grad_y.shape[:-1], weight.shape[1]), tuple(weight.shape), (weight.shape[0],))
    return tuple(
        grad_y.new_empty(shape) if asked else empty_grad(grad_y)
        for shape, asked in zip(shapes, output_mask, strict=True)
    )


GELU = define(
    "gelu(Tensor pre_activation, str backend) -> Tensor",
    fake=lambda pre_activation, backend: pre_activation.new_empty(pre_activation.shape),
    autograd=GeluFunction,
)
GELU_BACKWARD = define(
    "gelu_backward(Tensor grad_y, Tensor pre_activation, str backend) -> Tensor",
    fake=lambda grad_y, pre_activation, backend: pre_activation.new_empty(pre_activation.shape),
)
LINEAR_GELU = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, bool save_pre_activation, str backend)"
    " -> (Tensor y, Tensor pre_activation)",
    fake=_fake_forward,
    run=_run,
    autograd=LinearGeluFunction,
)
LINEAR_GELU_BACKWARD = define(
    f"{OP}_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor pre_activation, bool[3] output_mask, str backend)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_backward,
    run=_run_backward,
)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """A Linear and the exact (erf) GELU of it.

    y = gelu(x weight^T + bias)

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; under autocast float32 is cast as for torch's Linear.
        weight: [M, K], x's dtype.
        bias: [M], x's dtype, or None.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], x's dtype.

    Raises:
        ValueError: a wrong shape, dtype or device.

    Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415; InternMLP in OpenGVLab's modeling_intern_vit.py.
    """
    return linear_gelu_with_pre_activation(x, weight, bias, False, backend)[0]


def linear_gelu_with_pre_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool, backend: str | None
) -> tuple[Tensor, Tensor, str]:
    """`linear_gelu`, the pre-activation (empty unless asked for or differentiated) and the backend that ran."""
    check.rows(OP, "x", x)
    x, weight, bias = autocast(x, weight, bias)  # type: ignore[assignment]
    check.floating(OP, x=x, weight=weight, bias=bias)
    check.device(OP, "x", x, weight=weight, bias=bias)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{OP}: weight must have shape [M, {x.shape[-1]}] (x's last dimension), got {check.shape_of(weight)}"
        )
    check.vector(OP, "bias", bias, weight.shape[0], "weight's rows")
    check.same_dtype(OP, "x", x, **{n: t for n, t in (("weight", weight), ("bias", bias)) if t is not None})
    name = resolve(OP, x, backend)
    y, pre_activation = LINEAR_GELU(x, weight, bias, save_pre_activation, name)
    return y, pre_activation, name


def gelu(pre_activation: Tensor, backend: str | None = None) -> Tensor:
    """GELU with the bits that `linear_gelu` gives: for recomputing, and after a Linear that is not plain."""
    return GELU(pre_activation, resolve("gelu", pre_activation, backend))
