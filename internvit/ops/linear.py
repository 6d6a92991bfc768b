"""A Linear whose bits do not depend on the batch: on CPU an image at a time.

oneDNN and MKL choose blocking, and with it the order of summation, by the number of rows: bfloat16 1024 -> 3072 gives
other bits for 257 tokens alone than for two images of 257. One call per image has one number of rows, always.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from internvit.ops.core.direct import nothing_watches


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias for x [..., K]; the same bits for an image alone and in any batch."""
    whole = x.device.type != "cpu" or x.dim() < 3 or x.shape[0] < 2
    # A traced program takes any batch, and forward-mode differentiation does not go through views of `out`.
    if whole or torch.is_autocast_enabled("cpu") or not nothing_watches() or forward_ad._current_level >= 0:
        return F.linear(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], weight.shape[0]))
    for image, destination in zip(x, out, strict=True):
        destination.copy_(F.linear(image, weight, bias))
    return out
