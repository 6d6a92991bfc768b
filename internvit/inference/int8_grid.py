"""Weights that are int8 values times a scale for each row, exactly, while stored in floating point.

A calibrated model and a loaded int8 checkpoint have bfloat16 weights of that kind, and nothing beside them:
quantising them finds the integers and scales again, on any machine, and a weight that was changed no longer has them.
"""

import torch
from torch import Tensor

from internvit.ops.per_token_quant import per_token_quant

_VALUES = 16  # different integers, at least: constant and random-sign weights are exact in int8 by accident


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 values [M, K] and float32 scales [M] of a weight, symmetric, as the int8 Linears compute with."""
    weight_q, scale, _ = per_token_quant(weight.detach())
    return weight_q, scale


def dequantize_weight(weight_q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """scale * weight_q, rounded once."""
    return (weight_q.float() * scale.float().view(-1, 1)).to(dtype)


def round_rows(x: Tensor) -> Tensor:
    """x [..., K] as an int8 Linear takes it: quantised with a scale and a zero point a row, and back, in float32."""
    x_q, scale, zero = per_token_quant(x, symmetric=False)
    return (x_q.float() - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


def is_on_grid(weight: Tensor) -> bool:
    """Whether quantising a weight [M, K] to int8 and back gives its bits."""
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        return False
    weight_q, scale = quantize_weight(weight)
    if not torch.equal(dequantize_weight(weight_q, scale, weight.dtype), weight.detach()):
        return False
    return weight_q.unique().numel() > _VALUES
