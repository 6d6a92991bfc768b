"""RMSNorm on a GPU: `kernels/norm.py` without a mean.

y = x * rstd * weight,  rstd = 1 / sqrt(mean(x^2) + eps); reads x once, writes y and one float32 a row.
"""

from torch import Tensor

from internvit.kernels.norm import norm, norm_gradients
from internvit.ops.core.registration import Mask


def rms_norm(x: Tensor, weight: Tensor, eps: float, rounding: str) -> tuple[Tensor, Tensor]:
    y, _, rstd = norm("rms_norm", x, weight, None, eps, False, rounding)
    return y, rstd


def rms_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, output_mask: Mask
) -> tuple[Tensor, Tensor]:
    return norm_gradients("rms_norm", grad_y, x, weight, rstd, rstd, False, (*output_mask, False))[:2]
