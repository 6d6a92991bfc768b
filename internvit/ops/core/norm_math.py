"""Normalisation in plain PyTorch, forward and backward: what the references of four ops are made of.

Statistics and sums are in float32 (float64 for float64 input), as in every backend.
"""

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def statistics(x: Tensor, norm_type: str, eps: float) -> tuple[Tensor, Tensor]:
    """mean (empty for RMSNorm) and rstd of each row of x, in the accumulation dtype, without the last dimension."""
    x = x.to(accumulate_dtype(x))
    if norm_type == "rms_norm":
        return x.new_empty(0), torch.rsqrt(x.square().mean(-1) + eps)
    mean = x.mean(-1)
    return mean, torch.rsqrt((x - mean.unsqueeze(-1)).square().mean(-1) + eps)


def standardize(x: Tensor, mean: Tensor, rstd: Tensor, norm_type: str) -> Tensor:
    """(x - mean) * rstd in the accumulation dtype."""
    x = x.to(rstd.dtype)
    centred = x - mean.unsqueeze(-1) if norm_type == "layer_norm" else x
    return centred * rstd.unsqueeze(-1)


def scale_and_shift(x_hat: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, rounding: str) -> Tensor:
    """x_hat * weight + bias, rounded to `dtype` once ("fused"), or also before the weight ("reference")."""
    if rounding == "reference":
        x_hat = x_hat.to(dtype)
        return (x_hat * weight).to(dtype)
    y = x_hat * weight.to(x_hat.dtype)
    return (y if bias is None else y + bias.to(x_hat.dtype)).to(dtype)


def sum_rows(x: Tensor) -> Tensor:
    """Sum over all dimensions but the last."""
    return x.flatten(0, -2).sum(0) if x.dim() > 1 else x


def norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, norm_type: str
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x, grad_weight, grad_bias in the accumulation dtype.

    grad_x = rstd * (g - x_hat * mean(g * x_hat) [- mean(g)])  with  g = grad_y * weight
    """
    x_hat = standardize(x, mean, rstd, norm_type)
    grad_y = grad_y.to(x_hat.dtype)
    g = grad_y * weight.to(x_hat.dtype)
    inner = g - x_hat * (g * x_hat).mean(-1, keepdim=True)
    if norm_type == "layer_norm":
        inner = inner - g.mean(-1, keepdim=True)
    return inner * rstd.unsqueeze(-1), sum_rows(grad_y * x_hat), sum_rows(grad_y)
