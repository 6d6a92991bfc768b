"""Linears that torchao has quantised to int8, read without importing torchao.

`Int8DynamicActivationInt8WeightConfig` puts an `Int8Tensor` in the place of a Linear's weight: int8 values `qdata`, a
`scale` for each row, and how the input is quantised at each call. torchao quantises that symmetrically; the int8
Linears here with a zero point, which rounds a GELU's output twice as finely.

Source: pytorch/ao 0.18.0, torchao/quantization/quantize_/workflows/int8/int8_tensor.py.
"""

from typing import Any

import torch
from torch import Tensor, nn

from internvit.model.hooks import is_unhooked_linear


def int8_values(weight: Any) -> tuple[Tensor, Tensor] | None:
    """The int8 values [M, K] and float32 scales [M] of a weight that torchao has quantised with its input; or None."""
    if type(weight) in (nn.Parameter, Tensor) or not type(weight).__module__.startswith("torchao."):
        return None
    qdata, scale = getattr(weight, "qdata", None), getattr(weight, "scale", None)
    zero, dynamic = getattr(weight, "zero_point", None), getattr(weight, "act_quant_kwargs", None)
    if not (isinstance(qdata, Tensor) and isinstance(scale, Tensor) and dynamic is not None):
        return None
    if qdata.dtype != torch.int8 or qdata.dim() != 2 or scale.shape != (qdata.shape[0], 1):
        return None
    # Static or scaled inputs are other arithmetic than a row's own scale.
    if any(getattr(weight, name, None) is not None for name in ("act_quant_scale", "act_pre_scale")):
        return None
    if "PerRow" not in str(getattr(dynamic, "granularity", "")) or (zero is not None and bool(zero.any())):
        return None
    return qdata.detach(), scale.detach().squeeze(1).float()


def int8_linear_values(linear: nn.Module) -> tuple[Tensor, Tensor] | None:
    """`int8_values` of an `nn.Linear`'s weight; None for other modules and those with hooks."""
    return int8_values(linear.weight) if is_unhooked_linear(linear) else None
