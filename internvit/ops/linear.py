"""A Linear whose bits do not depend on the batch: on CPU an image at a time.

oneDNN and MKL choose blocking, and with it the order of summation, by the number of rows: bfloat16 1024 -> 3072 gives
other bits for 257 tokens alone than for two images of 257. One call per image has one number of rows, always. Layout
matters as well: PyTorch adds the bias in the GEMM for some strides and after a rounding for others (a quarter of all
elements differ in bfloat16), and MKL's order of summation depends on where a row begins within 64 bytes.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from internvit.ops.core.autocast import autocast_dtype, cast
from internvit.ops.core.direct import nothing_watches

_ALIGNMENT = 64
"""Bytes; those of every CPU tensor that PyTorch allocates."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias for x [B, ..., K]; on CPU the same bits for x[i:i + 1] alone, in any batch and layout.

    x [K] and [N, K] is one call of PyTorch's Linear. So is x in a traced program, which takes any batch, and under
    forward-mode differentiation, which does not go through writes into views.
    """
    whole = x.device.type != "cpu" or x.dim() < 3 or x.shape[0] == 0
    if whole or not nothing_watches() or forward_ad._current_level >= 0:
        return F.linear(x, weight, bias)
    dtype = autocast_dtype("cpu")
    if dtype is not None:
        x, weight, bias = cast(x, dtype), cast(weight, dtype), cast(bias, dtype)  # type: ignore[assignment]
    shape = (*x.shape[1:-1], weight.shape[0])
    if x.shape[0] == 1:
        return F.linear(_rows(x), weight, bias).view(1, *shape)
    out = x.new_empty((x.shape[0], *shape))
    for image, destination in zip(x.split(1), out, strict=True):
        destination.copy_(F.linear(_rows(image), weight, bias).view(shape))
    return out


def _rows(image: Tensor) -> Tensor:
    """image as [rows, K], contiguous and aligned."""
    rows = image.reshape(-1, image.shape[-1])
    if rows.is_contiguous() and rows.data_ptr() % _ALIGNMENT == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)
