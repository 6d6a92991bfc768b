"""Backend `triton`: the kernels of `internvit.kernels`, whose functions have the ops' names and signatures."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from internvit.kernels import gelu, layer_scale_residual, layer_scale_residual_norm, norm, qk_norm, qk_norm_stats
from internvit.kernels.attention.backward import attention_backward as attention_backward_kernels
from internvit.kernels.attention.forward import attention as attention_kernels
from internvit.ops.attention import Heads, QKNorm, QKNormGrads, SavedAttention
from internvit.ops.backends.registry import implements
from internvit.ops.linear_gelu import linear_then_gelu

_NO_QK_NORM: tuple[Any, ...] = (None, None, None, None)

_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    gelu.gelu,
    gelu.gelu_backward,
    layer_scale_residual.layer_scale_residual,
    layer_scale_residual.layer_scale_residual_backward,
    layer_scale_residual_norm.layer_scale_residual_norm,
    layer_scale_residual_norm.layer_scale_residual_norm_backward,
    norm.layer_norm,
    norm.layer_norm_backward,
    norm.rms_norm,
    norm.rms_norm_backward,
    qk_norm.qk_norm,
    qk_norm.qk_norm_backward,
    qk_norm_stats.qk_norm_stats,
    qk_norm_stats.qk_norm_stats_backward,
)
for _function in _FUNCTIONS:
    implements(_function.__name__, "triton")(_function)


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
    outputs: Any = attention_backward_kernels(grad_out, q, k, v, out, lse, scale, *(*inside, *grads))
    return None if qk_norm is None else QKNormGrads(*outputs)
