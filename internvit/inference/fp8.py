"""Linears of a GPU in float8_e4m3fn: weights and inputs quantised at each call, a scale for each row of either.

    y = x_scale * weight_scale * (x_q weight_q^T) + gamma * bias,  or gelu of that

Nothing is kept of the weights, so that they may change and CUDA graphs read them where they lie. Quantising a weight
moves 3 bytes of it: predicted 0.3 ms for InternViT-300M on an H100, where its forward in bfloat16 takes over 10 ms for
8 images. No GPU has run this yet.
"""

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn

from internvit.model.attention_summary import AttentionSummary
from internvit.model.block import InternViTLayer
from internvit.model.fused_block import BlockParts, BranchOutput, attention_output
from internvit.ops.core.sequences import Sequences
from internvit.ops.linear_fp8 import linear_fp8
from internvit.ops.per_token_quant import per_token_quant

_CAPABILITY = (8, 9)


def unavailable_reason(device: torch.device) -> str | None:
    """Why there are no float8 Linears on a device; None where there are."""
    needed = "a CUDA device of compute capability 8.9 or later (Ada, Hopper, Blackwell)"
    if device.type != "cuda":
        return f"{needed}, got {device}"
    capability = torch.cuda.get_device_capability(device)
    return None if capability >= _CAPABILITY else f"{needed}, got {capability[0]}.{capability[1]}"


class Fp8Linear:
    """gamma * Linear in float8; the module's parameters are read at each call."""

    def __init__(self, linear: nn.Linear, gamma: Tensor | None = None) -> None:
        self.linear, self.gamma = linear, gamma

    def __call__(self, x: Tensor, gelu: bool = False) -> Tensor:
        weight_q, scale, _ = per_token_quant(self.linear.weight.detach(), dtype=torch.float8_e4m3fn)
        x_q, x_scale, _ = per_token_quant(x, dtype=torch.float8_e4m3fn)
        bias = None if self.linear.bias is None else self.linear.bias.detach().float()
        if self.gamma is not None:
            gamma = self.gamma.detach().float()
            scale, bias = scale * gamma, None if bias is None else bias * gamma
        return linear_fp8(x_q, x_scale, weight_q, scale, bias, gelu=gelu, dtype=x.dtype)


def fp8_parts(
    layer: InternViTLayer,
    names: Collection[str],
    sequences: Sequences | None = None,
    summary: AttentionSummary | None = None,
) -> BlockParts:
    """An unmodified layer's parts, with the Linears of these names in float8."""
    parts, attn, mlp = layer.parts(sequences, summary), layer.attn, layer.mlp
    if "attn.qkv" in names:
        qkv = attn.parts(sequences, summary)._replace(qkv=(Fp8Linear(attn.qkv),))
        parts = parts._replace(attention=partial(attention_output, qkv))
    if "attn.proj" in names:
        parts = parts._replace(proj=BranchOutput(Fp8Linear(attn.proj, layer.ls1), None))
    if "mlp.fc1" in names:
        parts = parts._replace(fc1_gelu=partial(Fp8Linear(mlp.fc1), gelu=True))
    if "mlp.fc2" in names:
        parts = parts._replace(fc2=BranchOutput(Fp8Linear(mlp.fc2, layer.ls2), None))
    return parts
