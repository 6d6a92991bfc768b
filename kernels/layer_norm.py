"""LayerNorm on a GPU: `kernels/norm.py` with the row centred in registers.

y = (x - mean) * rstd * weight + bias; reads x once, writes y and two float32 a row.
"""

from torch import Tensor

from internvit.kernels.norm import norm, norm_gradients
from internvit.ops.core.registration import Mask


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return norm("layer_norm", x, weight, bias, eps, True, "fused")


def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, output_mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    return norm_gradients("layer_norm", grad_y, x, weight, mean.contiguous(), rstd, True, output_mask)
