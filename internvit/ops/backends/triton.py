"""Backend `triton`: the kernels of `internvit.kernels`, by the names of the ops."""

from internvit.kernels.attention.backward import attention_backward
from internvit.kernels.attention.forward import attention
from internvit.kernels.gelu import gelu, gelu_backward, linear_gelu
from internvit.kernels.layer_scale_residual import layer_scale_residual, layer_scale_residual_backward
from internvit.kernels.layer_scale_residual_norm import layer_scale_residual_norm, layer_scale_residual_norm_backward
from internvit.kernels.norm import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from internvit.kernels.qk_norm import qk_norm, qk_norm_backward
from internvit.kernels.qk_norm_stats import qk_norm_stats, qk_norm_stats_backward

__all__ = [
    "attention",
    "attention_backward",
    "gelu",
    "gelu_backward",
    "layer_norm",
    "layer_norm_backward",
    "layer_scale_residual",
    "layer_scale_residual_backward",
    "layer_scale_residual_norm",
    "layer_scale_residual_norm_backward",
    "linear_gelu",
    "qk_norm",
    "qk_norm_backward",
    "qk_norm_stats",
    "qk_norm_stats_backward",
    "rms_norm",
    "rms_norm_backward",
]
