"""RMSNorm, the block norm of InternViT-6B.

    y = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2) + eps),  over the last dimension C

x [..., C] of dtype T (float32, bfloat16, float16, float64), any strides; weight [C], T or float32;
y [..., C] of dtype T, contiguous; rstd [...] float32 (float64 for float64 input).
"""

from torch import Tensor
from torch.nn import functional as F

from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, norm_backward, scale_and_shift, standardize, statistics
from internvit.ops.core.registration import Mask, define, define_backward
from internvit.ops.core.spec import OpSpec, register_spec


@implements("rms_norm", "reference")
def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    mean, rstd = statistics(x, "rms_norm", eps)
    x_hat = standardize(x, mean, rstd, "rms_norm")
    return scale_and_shift(x_hat, weight, None, x.dtype, rounding).contiguous(), rstd


@implements("rms_norm_backward", "reference")
def rms_norm_backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, output_mask: Mask
) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, _ = norm_backward(grad_y, x, weight, rstd, rstd, "rms_norm")
    return (
        grad_x.to(x.dtype).contiguous() if output_mask[0] else None,
        grad_weight.to(weight.dtype) if output_mask[1] else None,
    )


def validate_rms_norm(op: str, x: Tensor, weight: Tensor, eps: float) -> None:
    check.rows(op, "x", x)
    check.floating(op, x=x, weight=weight)
    check.device(op, "x", x, weight=weight)
    check.vector(op, "weight", weight, x.shape[-1], "x's last dimension")
    check.eps(op, eps)


def _validate(x: Tensor, weight: Tensor, eps: float, rounding: str) -> None:
    validate_rms_norm("rms_norm", x, weight, eps)
    check.choice("rms_norm", "rounding", rounding, check.ROUNDINGS)


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_y, x, weight, rstd, output_mask, backend
) -> None:
    op = "rms_norm_backward"
    check.norm_backward(op, grad_y, x, weight, rstd=rstd)
    check.output_mask(op, output_mask, 2)


RMS_NORM = define(
    "rms_norm(Tensor x, Tensor weight, float eps, str rounding) -> (Tensor y, Tensor rstd)",
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x))),
    validate=_validate,
    compiled=("cpu", "cuda"),
)
define_backward(
    RMS_NORM,
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, bool[2] output_mask)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    validate=_validate_backward,
)


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, rounding: str = "fused", backend: str | None = None
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
    return RMS_NORM.call((x, weight, eps, rounding), backend)[0]


def _formula(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


register_spec(
    OpSpec(
        rms_norm,
        "rms_norm",
        _formula,
        {"": lambda make: {"x": make.hidden_states(), "weight": make.vector(1.0)}},
    )
)
