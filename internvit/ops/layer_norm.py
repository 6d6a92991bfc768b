"""LayerNorm, the block norm of InternViT-300M.

    y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var(x) + eps),  over the last dimension C

x [..., C] of dtype T (float32, bfloat16, float16, float64), any strides; weight, bias [C], T or float32;
y [..., C] of dtype T, contiguous; mean, rstd [...] float32 (float64 for float64 input).
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, norm_backward, scale_and_shift, standardize, statistics
from internvit.ops.core.registration import Mask, below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import reference, resolve


@reference("layer_norm")
def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = statistics(x, "layer_norm", eps)
    x_hat = standardize(x, mean, rstd, "layer_norm")
    return scale_and_shift(x_hat, weight, bias, x.dtype, "fused").contiguous(), mean, rstd


@reference("layer_norm_backward")
def layer_norm_backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = norm_backward(grad_y, x, weight, mean, rstd, "layer_norm")
    return (
        grad_x.to(x.dtype).contiguous() if output_mask[0] else empty_grad(x),
        grad_weight.to(weight.dtype) if output_mask[1] else empty_grad(weight),
        grad_bias.to(weight.dtype) if output_mask[2] else empty_grad(weight),
    )


class LayerNormFunction(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, rstd = below_autograd(LAYER_NORM, x, weight, bias, eps, backend)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.backend = backend
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return y, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 5
        mask = ctx.needs_input_grad[:3]
        grads = LAYER_NORM_BACKWARD(grad_y, *ctx.saved_tensors, mask, ctx.backend)
        return (*wanted(grads, mask), None, None)


LAYER_NORM = define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, str backend) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=lambda x, weight, bias, eps, backend: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x)),
        x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x)),
    ),
    autograd=LayerNormFunction,
)
LAYER_NORM_BACKWARD = define(
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[3] output_mask,"
    " str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=lambda grad_y, x, weight, mean, rstd, output_mask, backend: (
        x.new_empty(x.shape) if output_mask[0] else empty_grad(x),
        weight.new_empty(weight.shape) if output_mask[1] else empty_grad(weight),
        weight.new_empty(weight.shape) if output_mask[2] else empty_grad(weight),
    ),
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """LayerNorm over the last dimension, with float32 statistics.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, any strides.
        weight: [C], x's dtype or float32.
        bias: [C], weight's dtype, or None.
        eps: added to the (biased) variance.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., C], x's dtype, contiguous, rounded once.

    Raises:
        ValueError: a wrong shape, dtype or device.

    Source: Ba, Kiros & Hinton 2016, https://arxiv.org/abs/1607.06450.
    """
    check.rows("layer_norm", "x", x)
    check.floating("layer_norm", x=x, weight=weight, bias=bias)
    check.device("layer_norm", "x", x, weight=weight, bias=bias)
    check.vector("layer_norm", "weight", weight, x.shape[-1], "x's last dimension")
    check.vector("layer_norm", "bias", bias, x.shape[-1], "x's last dimension")
    if bias is not None:
        check.same_dtype("layer_norm", "weight", weight, bias=bias)
    check.eps("layer_norm", eps)
    return LAYER_NORM(x, weight, bias, eps, resolve("layer_norm", x, backend))[0]
