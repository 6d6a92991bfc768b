"""The one validation of op arguments: each error names the op, the argument, what came and what was expected."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDINGS = ("fused", "reference")
NORM_TYPES = ("rms_norm", "layer_norm")


def shape_of(t: Tensor) -> str:
    return str(list(t.shape))


def floating(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATING:
            raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}")


def device(op: str, first: str, x: Tensor, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: {name} must be on {first}'s device {x.device}, got {t.device}")


def rows(op: str, name: str, x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have a last dimension of at least 1, got shape {shape_of(x)}")


def vector(op: str, name: str, t: Tensor | None, length: int, whose: str) -> None:
    if t is not None and tuple(t.shape) != (length,):
        raise ValueError(f"{op}: {name} must have shape [{length}] ({whose}), got {shape_of(t)}")


def linear_weight(op: str, x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{op}: weight must have shape [M, {x.shape[-1]}] (x's last dimension), got {shape_of(weight)}"
        )


def same_shape(op: str, name: str, t: Tensor, first: str, x: Tensor) -> None:
    if t.shape != x.shape:
        raise ValueError(f"{op}: {name} must have {first}'s shape {shape_of(x)}, got {shape_of(t)}")


def same_dtype(op: str, first: str, x: Tensor, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype != x.dtype:
            raise ValueError(f"{op}: {name} must have {first}'s dtype {x.dtype}, got {t.dtype}")


def choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def eps(op: str, eps: float) -> None:
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"{op}: eps must be a number >= 0, got {eps!r}")


def row_scale(op: str, row_scale: Tensor | None, residual: Tensor) -> None:
    if row_scale is None:
        return
    if residual.dim() < 2:
        raise ValueError(f"{op}: row_scale needs a residual of shape [B, ..., C], got {shape_of(residual)}")
    vector(op, "row_scale", row_scale, residual.shape[0], "one factor per image of residual")
    if row_scale.requires_grad:
        raise ValueError(f"{op}: row_scale is a random factor and gets no gradient, got requires_grad=True")


def heads(op: str, **tensors: Tensor) -> None:
    """q, k, v are [B, N, H, D] of one shape, dtype and device, contiguous in D."""
    names = iter(tensors.items())
    first, x = next(names)
    if x.dim() != 4 or 0 in x.shape[2:]:
        raise ValueError(f"{op}: {first} must have shape [B, N, H, D], got {shape_of(x)}")
    for name, t in names:
        same_shape(op, name, t, first, x)
        same_dtype(op, first, x, **{name: t})
    device(op, first, x, **tensors)
    floating(op, **tensors)


def qk_weights(op: str, q: Tensor, **weights: Tensor | None) -> None:
    floating(op, **weights)
    device(op, "q", q, **weights)
    for name, weight in weights.items():
        vector(op, name, weight, q.shape[2] * q.shape[3], "q's heads times head dimension")


def token_statistics(op: str, q: Tensor, **statistics: Tensor | None) -> None:
    device(op, "q", q, **statistics)
    for name, t in statistics.items():
        if t is not None and t.shape != q.shape[:2]:
            raise ValueError(f"{op}: {name} must have shape {list(q.shape[:2])} (q's [B, N]), got {shape_of(t)}")
