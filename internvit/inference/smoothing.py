"""Moving the size of outlier channels out of a Linear's input into its weight, without changing what is computed.

    qkv, fc1:  norm.weight / s, norm.bias / s  and  weight * s       (columns)
    proj:      the rows of v in qkv / s        and  weight * s       (attention mixes tokens, no channels)

s has powers of two only: all products are exact, in bfloat16 too. fc2 follows a GELU, which no factor passes.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438; its factors are max |x_j|^a / max |w_j|^(1 - a).
"""

import torch
from torch import Tensor

from internvit.inference.int8_grid import quantize_weight, round_rows
from internvit.model.block import InternViTLayer

STRENGTHS = (0.0, 0.5, 0.7, 0.85, 1.0)


def smoothing_factors(rows: Tensor, largest: Tensor, weight: Tensor) -> Tensor:
    """The powers of two [K] that leave the least error of rows @ weight.T with both in int8.

    Args:
        rows: [N, K], a sample of the inputs.
        largest: [K], each channel's largest magnitude, a mean over images.
        weight: [M, K].
    """
    exact = rows @ weight.T
    size, columns = largest.clamp_min(1e-10), weight.square().mean(0).sqrt().clamp_min(1e-10)
    best, least = torch.ones_like(size), torch.inf
    for strength in STRENGTHS:
        factors = torch.ones_like(size)
        if strength:
            raw = strength * size.log2() - (1 - strength) * columns.log2()
            factors = (raw - raw.mean()).round().clamp(-16, 16).exp2()
        weight_q, scale = quantize_weight(weight * factors)
        product = round_rows(rows / factors) @ (weight_q.float() * scale.unsqueeze(1)).T
        error = (product - exact).square().sum().item()
        if error < least:
            best, least = factors, error
    return best


@torch.no_grad()
def migrate(layer: InternViTLayer, name: str, factors: Tensor) -> None:
    """Divides the input of the layer's Linear `name` by factors [K], and multiplies its weight by them.

    Raises:
        ValueError: a Linear whose input no factor can be moved out of.
    """
    if name == "attn.proj":
        qkv, linear = layer.attn.qkv, layer.attn.proj
        rows = [qkv.weight[-len(factors) :].T, *([] if qkv.bias is None else [qkv.bias[-len(factors) :]])]
    elif name in ("attn.qkv", "mlp.fc1"):
        norm = layer.norm1 if name == "attn.qkv" else layer.norm2
        linear = layer.attn.qkv if name == "attn.qkv" else layer.mlp.fc1
        rows = [norm.weight, *([] if norm.bias is None else [norm.bias])]
    else:
        raise ValueError(f"migrate: name must be attn.qkv, attn.proj or mlp.fc1, got {name!r}")
    for row in rows:
        row.div_(factors)
    linear.weight.mul_(factors)
