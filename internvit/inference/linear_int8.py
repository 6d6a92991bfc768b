"""Linears of the CPU in int8: each token and each output channel has a scale of its own, taken from it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.inference.torchao_int8 import int8_values
from internvit.model.fused_block import QuantizedRows
from internvit.ops.backends import native

GROUP = 128
"""The input features that share a scale in a grouped weight."""


def unavailable_reason() -> str | None:
    """Why this machine has no int8 Linears; None when it has."""
    reason = native.unavailable_reason("internvit_cpu")
    if reason is not None:
        return reason
    sets = torch.ops.internvit_cpu.instruction_sets()
    if not torch.ops.internvit_cpu.multiplies_int8():
        return f"int8 Linears need a CPU with AVX2, this one has {sets}"
    return None


def quantize_weight(weight: Tensor, grouped: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """weight [M, K] as weight_q int8 and weight_scale [M]; grouped, with each group's scale over that, [M, K / 128].

    weight = weight_q * weight_scale * group_ratio, to half a step
    """
    quantize = torch.ops.internvit_cpu.per_token_quant
    if not grouped:
        return (*quantize(weight, True, torch.int8)[:2], None)
    in_features = weight.shape[1]
    groups = F.pad(weight, (0, -in_features % GROUP)).unflatten(1, (-1, GROUP))
    weight_q, scale, _ = quantize(groups, True, torch.int8)
    largest = scale.amax(1)
    ratio = torch.where(largest[:, None] > 0, scale / largest[:, None], 1.0)
    return weight_q.flatten(1)[:, :in_features].contiguous(), largest, ratio


class Int8Linear:
    """gamma * Linear in int8, by the CPU library.

        y = x_scale * weight_scale * ((x_q - x_zero) weight_q^T) + gamma * bias,  or gelu of that

    x is quantised by the norm before, or at each call, a token at a time, in the pass that packs it for the product;
    with a zero point either way. gamma rides in weight_scale, where it costs no rounding of the weight. A weight that
    torchao has quantised keeps its values.

    Args:
        grouped: a scale for each 128 input features of an output channel instead of one for all: three quarters of the
            weight's rounding error, for 3 to 5 % of the product's time (VPDPBUSD, 1025 tokens, one EPYC core).
    """

    one_image = False

    def __init__(self, weight: Tensor, bias: Tensor | None, gamma: Tensor | None = None, grouped: bool = False) -> None:
        values = int8_values(weight)
        weight_q, scale, ratio = quantize_weight(weight, grouped) if values is None else (*values, None)
        factor = 1.0 if gamma is None else gamma.double()
        self.packed = torch.ops.internvit_cpu.pack_weight_int8(weight_q, ratio)
        self.weight_scale = (scale.double() * factor).float()
        self.bias = None if bias is None else (bias.double() * factor).float()
        self.in_features, self.dtype = weight.shape[1], weight.dtype

    @property
    def weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.packed, self.weight_scale, self.bias

    def __call__(self, x: Tensor | QuantizedRows, gelu: bool = False) -> Tensor:
        cpu = torch.ops.internvit_cpu
        if isinstance(x, QuantizedRows):
            return cpu.linear_int8_packed(x.x_q, x.x_scale, *self.weight, x.x_zero, None, gelu, self.dtype)
        return cpu.linear_int8_dynamic(x, *self.weight, gelu)


class Int8MLP:
    """fc2(gelu(fc1(x))) in int8: the GELU's output is quantised in cache, and its float32 rows never reach memory.

    As fast as the two Linears with a bfloat16 tensor between them (1025 tokens, 1024 -> 4096 -> 1024, one EPYC core),
    a quarter of their bytes, and no rounding to bfloat16.
    """

    def __init__(self, fc1: Int8Linear, fc2: Int8Linear) -> None:
        self.fc1, self.fc2 = fc1, fc2

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        rows = x if isinstance(x, QuantizedRows) else (x, None, None)
        return torch.ops.internvit_cpu.mlp_int8(*rows, *self.fc1.weight, *self.fc2.weight, self.fc2.dtype)
