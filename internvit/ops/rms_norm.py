"""RMSNorm, the block norm of InternViT-6B.

    y = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2) + eps),  over the last dimension C

x [..., C] of dtype T (float32, bfloat16, float16, float64), any strides; weight [C], T or float32;
y [..., C] of dtype T, contiguous; rstd [...] float32 (float64 for float64 input).
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, norm_backward, scale_and_shift, standardize, statistics
from internvit.ops.core.registration import Mask, below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import reference, resolve


@reference("rms_norm")
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    mean, rstd = statistics(x, "rms_norm", eps)
    x_hat = standardize(x, mean, rstd, "rms_norm")
    return scale_and_shift(x_hat, weight, None, x.dtype, rounding).contiguous(), rstd


@reference("rms_norm_backward")
def rms_norm_backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, output_mask: Mask
) -> tuple[Tensor, Tensor]:
    grad_x, grad_weight, _ = norm_backward(grad_y, x, weight, rstd, rstd, "rms_norm")
    return (
        grad_x.to(x.dtype).contiguous() if output_mask[0] else empty_grad(x),
        grad_weight.to(weight.dtype) if output_mask[1] else empty_grad(weight),
    )


class RMSNormFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rounding: str, backend: str) -> tuple[Tensor, Tensor]:
        y, rstd = below_autograd(RMS_NORM, x, weight, eps, rounding, backend)
        ctx.save_for_backward(x, weight, rstd)
        ctx.backend = backend
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        return y, rstd

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad_y is None:
            return (None,) * 5
        mask = ctx.needs_input_grad[:2]
        grads = RMS_NORM_BACKWARD(grad_y, *ctx.saved_tensors, mask, ctx.backend)
        return (*wanted(grads, mask), None, None, None)


RMS_NORM = define(
    "rms_norm(Tensor x, Tensor weight, float eps, str rounding, str backend) -> (Tensor y, Tensor rstd)",
    fake=lambda x, weight, eps, rounding, backend: (
        x.new_empty(x.shape),
        x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x)),
    ),
    autograd=RMSNormFunction,
)
RMS_NORM_BACKWARD = define(
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, bool[2] output_mask, str backend)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    fake=lambda grad_y, x, weight, rstd, output_mask, backend: (
        x.new_empty(x.shape) if output_mask[0] else empty_grad(x),
        weight.new_empty(weight.shape) if output_mask[1] else empty_grad(weight),
    ),
)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-6, rounding: str = "fused", backend: str | None = None
) -> Tensor:
    """RMSNorm over the last dimension, with float32 statistics.

    y = x / sqrt(mean(x^2) + eps) * weight

    Args:
        x: [..., C], float32, bfloat16, float16 or float64, any strides.
        weight: [C], x's dtype or float32.
        eps: added to the mean square.
        rounding: "fused" rounds once, after the weight; "reference" rounds to x's dtype before the weight as well,
            as upstream does (26 % of bfloat16 outputs at C = 3200 differ by one ulp between the two).
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., C], x's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or choice.

    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467; InternRMSNorm in OpenGVLab's code.
    """
    check.rows("rms_norm", "x", x)
    check.floating("rms_norm", x=x, weight=weight)
    check.device("rms_norm", "x", x, weight=weight)
    check.vector("rms_norm", "weight", weight, x.shape[-1], "x's last dimension")
    check.eps("rms_norm", eps)
    check.choice("rms_norm", "rounding", rounding, check.ROUNDINGS)
    return RMS_NORM(x, weight, eps, rounding, resolve("rms_norm", x, backend))[0]
