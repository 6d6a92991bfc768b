"""The fused ops, as functions of tensors. Each file holds one op: formula, reference, schema, autograd, validation."""

from internvit.ops.attention import attention
from internvit.ops.attention_column_sums import attention_column_sums
from internvit.ops.core.select import backend, set_backend
from internvit.ops.fold_norm import fold_norm
from internvit.ops.gelu import gelu
from internvit.ops.gelu_quant import gelu_quant
from internvit.ops.layer_norm import layer_norm
from internvit.ops.layer_norm_quant import layer_norm_quant
from internvit.ops.layer_scale_residual import layer_scale_residual
from internvit.ops.layer_scale_residual_norm import layer_scale_residual_norm
from internvit.ops.layer_scale_residual_norm_quant import layer_scale_residual_norm_quant
from internvit.ops.linear_fp8 import linear_fp8
from internvit.ops.linear_gelu import linear_gelu
from internvit.ops.linear_int8 import linear_int8
from internvit.ops.linear_layer_scale import linear_layer_scale
from internvit.ops.linear_residual_stats import linear_residual_stats
from internvit.ops.norm_linear import norm_linear
from internvit.ops.norm_qkv import norm_qkv
from internvit.ops.per_token_quant import per_token_quant
from internvit.ops.qk_norm import qk_norm
from internvit.ops.qk_norm_attention import qk_norm_attention, qk_norm_attention_qkvpacked
from internvit.ops.qk_norm_stats import qk_norm_stats
from internvit.ops.rms_norm import rms_norm
from internvit.ops.rms_norm_quant import rms_norm_quant

__all__ = [
    "attention",
    "attention_column_sums",
    "backend",
    "fold_norm",
    "gelu",
    "gelu_quant",
    "layer_norm",
    "layer_norm_quant",
    "layer_scale_residual",
    "layer_scale_residual_norm",
    "layer_scale_residual_norm_quant",
    "linear_fp8",
    "linear_gelu",
    "linear_int8",
    "linear_layer_scale",
    "linear_residual_stats",
    "norm_linear",
    "norm_qkv",
    "per_token_quant",
    "qk_norm",
    "qk_norm_attention",
    "qk_norm_attention_qkvpacked",
    "qk_norm_stats",
    "rms_norm",
    "rms_norm_quant",
    "set_backend",
]
