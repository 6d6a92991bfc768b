"""What int8 Linears compute, emulated in floating point: exactly the roundings of their operands and no others."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from internvit.inference.int8_grid import dequantize_weight, quantize_weight, round_rows
from internvit.model.vit import InternViT
from internvit.numerics import relative_error


@torch.no_grad()
def emulate_int8(model: InternViT, names: Iterable[str]) -> InternViT:
    """A float32 copy of the model whose Linears of these names have int8 weights and inputs, in float32 products."""
    emulation = copy.deepcopy(model).float()
    for name in names:
        linear: Any = emulation.get_submodule(name)
        weight = linear.weight.data
        weight.copy_(dequantize_weight(*quantize_weight(weight), weight.dtype))
        linear.register_forward_pre_hook(lambda module, arguments: (round_rows(arguments[0]),))
    return emulation


def int8_violations(actual: Tensor, truth: Tensor, bfloat16: Tensor, emulation: Tensor) -> list[str]:
    """The contract of a model in int8: 1.1 times the error of its int8 operands and of bfloat16, by squares.

    Args:
        actual: what an int8 model computes.
        truth: the same in float32 or wider, without int8.
        bfloat16: in bfloat16, without int8.
        emulation: with int8 operands, in float32.
    """
    error = relative_error(actual, truth)
    allowed = 1.1 * math.hypot(relative_error(bfloat16, truth), relative_error(emulation, truth))
    return [] if error <= allowed else [f"relative error {error:.2e} in int8, allowed {allowed:.2e}"]
