"""Backend `triton`: the kernels of `internvit.kernels`, under the ops' names and signatures."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from internvit.kernels import gelu, layer_scale_residual, layer_scale_residual_norm, norm, qk_norm, qk_norm_stats
from internvit.kernels.attention.backward import attention_backward as attention_backward_kernels
from internvit.kernels.attention.forward import attention as attention_kernels
from internvit.ops.attention import Heads, QKNorm, QKNormGrads, SavedAttention
from internvit.ops.backends.registry import implements
from internvit.ops.core.registration import Mask
from internvit.ops.linear_gelu import linear_then_gelu

_NO_QK_NORM: tuple[Any, ...] = (None, None, None, None)

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "gelu": gelu.gelu,
    "gelu_backward": gelu.gelu_backward,
    "layer_scale_residual": layer_scale_residual.layer_scale_residual,
    "layer_scale_residual_backward": layer_scale_residual.layer_scale_residual_backward,
    "layer_scale_residual_norm": layer_scale_residual_norm.layer_scale_residual_norm,
    "layer_scale_residual_norm_backward": layer_scale_residual_norm.layer_scale_residual_norm_backward,
    "qk_norm": qk_norm.qk_norm,
    "qk_norm_backward": qk_norm.qk_norm_backward,
    "qk_norm_stats": qk_norm_stats.qk_norm_stats,
    "qk_norm_stats_backward": qk_norm_stats.qk_norm_stats_backward,
}
for _op, _function in _FUNCTIONS.items():
    implements(_op, "triton")(_function)


@implements("rms_norm", "triton")
def rms_norm(x: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    y, _, rstd = norm.norm("rms_norm", x, weight, None, eps, False, rounding)
    return y, rstd


@implements("rms_norm_backward", "triton")
def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, output_mask: Mask) -> Any:
    return norm.norm_gradients("rms_norm", grad_y, x, weight, rstd, rstd, False, (*output_mask, False))[:2]


@implements("layer_norm", "triton")
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return norm.norm("layer_norm", x, weight, bias, eps, True, "fused")


@implements("layer_norm_backward", "triton")
def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: Mask
) -> Any:
    return norm.norm_gradients("layer_norm", grad_y, x, weight, mean.contiguous(), rstd, True, output_mask)


@implements("linear_gelu", "triton")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return linear_then_gelu("triton", x, weight, bias)


@implements("attention", "triton")
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None) -> tuple[Tensor, Tensor]:
    return attention_kernels(q, k, v, scale, *(qk_norm or _NO_QK_NORM))


@implements("attention_backward", "triton")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> QKNormGrads | None:
    q, k, v, out, lse, scale, qk_norm = saved
    inside: tuple[Any, ...] = qk_norm or _NO_QK_NORM
    outputs = attention_backward_kernels(grad_out, q, k, v, out, lse, scale, *(*inside, *grads))
    return None if qk_norm is None else QKNormGrads(*outputs)
