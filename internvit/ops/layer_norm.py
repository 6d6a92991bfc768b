"""LayerNorm, the block norm of InternViT-300M.

    y = (x - mean) * rstd * weight + bias,  rstd = 1 / sqrt(var(x) + eps),  over the last dimension C

x [..., C] of dtype T (float32, bfloat16, float16, float64), any strides; weight, bias [C], T or float32;
y [..., C] of dtype T, contiguous; mean, rstd [...] float32 (float64 for float64 input).
"""

from torch import Tensor
from torch.nn import functional as F

from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, norm_backward, scale_and_shift, standardize, statistics
from internvit.ops.core.registration import Mask, define, define_backward
from internvit.ops.core.spec import OpSpec, layer_norm_rule, register_spec


@implements("layer_norm", "reference")
def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = statistics(x, "layer_norm", eps)
    x_hat = standardize(x, mean, rstd, "layer_norm")
    return scale_and_shift(x_hat, weight, bias, x.dtype, "fused").contiguous(), mean, rstd


@implements("layer_norm_backward", "reference")
def layer_norm_backward_reference(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: Mask
) -> tuple[Tensor | None, ...]:
    grad_x, grad_weight, grad_bias = norm_backward(grad_y, x, weight, mean, rstd, "layer_norm")
    return (
        grad_x.to(x.dtype).contiguous() if output_mask[0] else None,
        grad_weight.to(weight.dtype) if output_mask[1] else None,
        grad_bias.to(weight.dtype) if output_mask[2] else None,
    )


def validate_layer_norm(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    check.rows(op, "x", x)
    check.floating(op, x=x, weight=weight, bias=bias)
    check.device(op, "x", x, weight=weight, bias=bias)
    check.vector(op, "weight", weight, x.shape[-1], "x's last dimension")
    check.vector(op, "bias", bias, x.shape[-1], "x's last dimension")
    check.bias(op, bias, weight)
    check.eps(op, eps)


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_y, x, weight, mean, rstd, output_mask, backend
) -> None:
    op = "layer_norm_backward"
    check.norm_backward(op, grad_y, x, weight, mean=mean, rstd=rstd)
    check.output_mask(op, output_mask, 3)


LAYER_NORM = define(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=lambda x, *_: (
        x.new_empty(x.shape),
        *(x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x)) for _ in range(2)),
    ),
    validate=lambda *args: validate_layer_norm("layer_norm", *args),
    compiled=("cpu", "cuda"),
)
define_backward(
    LAYER_NORM,
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool[3] output_mask)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    validate=_validate_backward,
    grads_like={"grad_bias": "weight"},
)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-6, backend: str | None = None
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
    return LAYER_NORM.call((x, weight, bias, eps), backend)[0]


def _formula(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


register_spec(
    OpSpec(
        layer_norm,
        "layer_norm",
        _formula,
        {"": lambda make: {"x": make.hidden_states(), "weight": make.vector(1.0), "bias": make.vector()}},
        layer_norm_rule,
    )
)
