"""Linears of the CPU in int8: each token and each output channel has a scale of its own, taken from it."""

import torch
from torch import Tensor

from internvit.ops.backends import native


def unavailable_reason() -> str | None:
    """Why this machine has no int8 Linear that is faster than a bfloat16 one; None when it has."""
    reason = native.unavailable_reason("internvit_cpu")
    if reason is not None:
        return reason
    sets = torch.ops.internvit_cpu.instruction_sets()
    if not torch.ops.internvit_cpu.multiplies_int8():
        return f"int8 Linears need a CPU with AVX-512 VNNI and BF16, this one has {sets}"
    if "amx" in sets.split():  # 512 products a cycle in bfloat16 tiles, 128 in two VPDPBUSD
        return "this CPU multiplies bfloat16 by AMX faster than int8 by VNNI; int8 by AMX is not there yet"
    return None


class Int8Linear:
    """gamma * Linear in int8, by the CPU library.

        y = x_scale * weight_scale * ((x_q - x_zero) weight_q^T) + gamma * bias,  or gelu of that

    x is quantised at each call, a token at a time, in the pass that packs it for the product; with a zero point, as a
    GELU's output has hardly anything below 0.
    gamma rides in weight_scale, where it costs no rounding of the weight.
    """

    one_image = False

    def __init__(self, weight: Tensor, bias: Tensor | None, gamma: Tensor | None = None) -> None:
        cpu = torch.ops.internvit_cpu
        weight_q, scale, _ = cpu.quantize_rows_int8(weight, True)
        factor = 1.0 if gamma is None else gamma.double()
        self.packed = cpu.pack_weight_int8(weight_q)
        self.weight_scale = (scale.double() * factor).float()
        self.bias = None if bias is None else (bias.double() * factor).float()

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        dynamic = torch.ops.internvit_cpu.linear_int8_dynamic
        return dynamic(x, self.packed, self.weight_scale, self.bias, gelu)
