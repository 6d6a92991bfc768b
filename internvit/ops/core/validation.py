"""What ops require of their arguments: each error names the op, the argument, what came and what was expected.

Each op has one function of these rules, which its public function, its fake implementation and the registered op call;
csrc/common/op_checks.h has the same rules for callers without Python.
"""

import torch
from torch import Tensor

from internvit.ops.backends.registry import BACKENDS

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ROUNDINGS = ("fused", "reference")
NORM_TYPES = ("rms_norm", "layer_norm")


def shape_of(t: Tensor) -> str:
    return str(list(t.shape))


def floating(op: str, **tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.dtype not in FLOATING:
            raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}")


def device(op: str, first: str, x: Tensor, /, **tensors: Tensor | None) -> None:
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


def linear_backward(
    op: str, first: str, grad_y: Tensor, x: Tensor | None, weight: Tensor, x_asked: bool, x_dtype: torch.dtype
) -> None:
    """x [..., K] of `x_dtype` and weight [M, K] beside the gradient [..., M] of a Linear's output."""
    if x_dtype not in FLOATING:
        raise ValueError(f"{op}: x_dtype must be float32, bfloat16, float16 or float64, got {x_dtype}")
    device(op, first, grad_y, x=x, weight=weight)
    if weight.dim() != 2 or weight.shape[0] != grad_y.shape[-1]:
        raise ValueError(
            f"{op}: weight must have shape [{grad_y.shape[-1]}, K] ({first}'s last dimension), got {shape_of(weight)}"
        )
    if x is None:
        if x_asked:
            raise ValueError(f"{op}: x must be given where output_mask asks for the weight's gradient, got None")
        return
    expected = [*grad_y.shape[:-1], weight.shape[1]]
    if list(x.shape) != expected:
        raise ValueError(f"{op}: x must have shape {expected} (weight's columns), got {shape_of(x)}")
    if x.dtype != x_dtype:
        raise ValueError(f"{op}: x must have x_dtype {x_dtype}, got {x.dtype}")


def same_shape(op: str, name: str, t: Tensor, first: str, x: Tensor) -> None:
    if t.shape != x.shape:
        raise ValueError(f"{op}: {name} must have {first}'s shape {shape_of(x)}, got {shape_of(t)}")


def same_dtype(op: str, first: str, x: Tensor, /, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dtype != x.dtype:
            raise ValueError(f"{op}: {name} must have {first}'s dtype {x.dtype}, got {t.dtype}")


def like(op: str, first: str, x: Tensor, /, **tensors: Tensor | None) -> None:
    """Tensors of x's shape, dtype and device."""
    device(op, first, x, **tensors)
    for name, t in tensors.items():
        if t is not None:
            same_shape(op, name, t, first, x)
            same_dtype(op, first, x, **{name: t})


def leading(op: str, first: str, x: Tensor, dims: int, whose: str, /, **statistics: Tensor | None) -> None:
    """Statistics, one number for each index of x's first `dims` dimensions."""
    device(op, first, x, **statistics)
    for name, t in statistics.items():
        if t is not None and t.shape != x.shape[:dims]:
            raise ValueError(
                f"{op}: {name} must have shape {list(x.shape[:dims])} ({first}'s {whose}), got {shape_of(t)}"
            )
    floating(op, **statistics)


def parameters(op: str, first: str, x: Tensor, length: int, whose: str, /, **tensors: Tensor | None) -> None:
    """Vectors [length] of any floating dtype on x's device."""
    floating(op, **tensors)
    device(op, first, x, **tensors)
    for name, t in tensors.items():
        vector(op, name, t, length, whose)


def bias(op: str, bias: Tensor | None, weight: Tensor) -> None:
    if bias is not None:
        same_dtype(op, "weight", weight, bias=bias)


def output_mask(op: str, mask: tuple[bool, ...] | list[bool], length: int) -> None:
    if len(mask) != length:
        raise ValueError(f"{op}: output_mask must have {length} elements, got {len(mask)}")


def choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def eps(op: str, eps: float) -> None:
    if isinstance(eps, torch.SymFloat):  # known when the traced program runs, and checked then
        return
    if not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"{op}: eps must be a number >= 0, got {eps!r}")


def scale(op: str, scale: float) -> None:
    if isinstance(scale, torch.SymFloat):
        return
    # Not math.isfinite, which no graph with a dynamic head dimension, and so a symbolic scale, can hold.
    if not isinstance(scale, (int, float)) or scale - scale != 0:
        raise ValueError(f"{op}: scale must be a finite number, got {scale!r}")


def row_scale(op: str, row_scale: Tensor | None, residual: Tensor) -> None:
    if row_scale is None:
        return
    if residual.dim() < 2:
        raise ValueError(f"{op}: row_scale needs a residual of shape [B, ..., C], got {shape_of(residual)}")
    floating(op, row_scale=row_scale)
    vector(op, "row_scale", row_scale, residual.shape[0], "one factor per image of residual")
    if row_scale.requires_grad:
        raise ValueError(f"{op}: row_scale is a random factor and gets no gradient, got requires_grad=True")


def heads(op: str, *, varlen: bool = False, **tensors: Tensor) -> None:
    """q, k, v are [B, N, H, D], or [total, H, D] beside cu_seqlens, of one shape, dtype and device."""
    names = iter(tensors.items())
    first, x = next(names)
    if x.dim() != 4 - varlen or 0 in x.shape[-2:]:
        layout = "[total, H, D] beside cu_seqlens" if varlen else "[B, N, H, D]"
        raise ValueError(f"{op}: {first} must have shape {layout}, got {shape_of(x)}")
    for name, t in names:
        same_shape(op, name, t, first, x)
        same_dtype(op, first, x, **{name: t})
    device(op, first, x, **tensors)
    floating(op, **tensors)


def keys(op: str, q: Tensor, k: Tensor, v: Tensor, *, own_length: bool) -> None:
    """k and v are of one shape, and like q but for the number of tokens where keys may have their own."""
    if own_length and (k.dim() != q.dim() or k.shape[-2:] != q.shape[-2:] or k.shape[:-3] != q.shape[:-3]):
        expected = ", ".join(["N_k" if n == q.dim() - 3 else str(size) for n, size in enumerate(q.shape)])
        raise ValueError(f"{op}: k must have shape [{expected}] (q's, of any number of tokens), got {shape_of(k)}")
    if not own_length:
        same_shape(op, "k", k, "q", q)
    same_shape(op, "v", v, "k", k)
    same_dtype(op, "q", q, k=k, v=v)
    device(op, "q", q, k=k, v=v)


def qk_weights(op: str, q: Tensor, **weights: Tensor | None) -> None:
    parameters(op, "q", q, q.shape[-2] * q.shape[-1], "q's heads times head dimension", **weights)


def token_statistics(op: str, q: Tensor, **statistics: Tensor | None) -> None:
    leading(op, "q", q, q.dim() - 2, "[B, N]" if q.dim() == 4 else "tokens", **statistics)


def sequences(op: str, first: str, x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, of: str = "") -> None:
    """int32 [B + 1] and a number, or neither; `core.sequences.check_values` checks values. `of`: "_k" for keys."""
    if (cu_seqlens is None) != (max_seqlen is None):
        absent = "cu_seqlens" if cu_seqlens is None else "max_seqlen"
        raise ValueError(f"{op}: cu_seqlens and max_seqlen go together, got None for {absent}")
    if cu_seqlens is None:
        return
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{op}: cu_seqlens{of} must be torch.int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{op}: cu_seqlens{of} must have shape [B + 1], got {shape_of(cu_seqlens)}")
    device(op, first, x, **{f"cu_seqlens{of}": cu_seqlens})
    if isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt)) or max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen{of} must be an integer >= 0, got {max_seqlen!r}")


def key_sequences(op: str, x: Tensor, ends: Tensor | None, ends_k: Tensor | None, max_seqlen_k: int | None) -> None:
    """cu_seqlens_k like cu_seqlens and max_seqlen_k, or neither."""
    if (ends_k is None) != (max_seqlen_k is None):
        absent = "cu_seqlens_k" if ends_k is None else "max_seqlen_k"
        raise ValueError(f"{op}: cu_seqlens_k and max_seqlen_k go together, got None for {absent}")
    if ends_k is None:
        return
    if ends is None:
        raise ValueError(f"{op}: cu_seqlens must be given beside cu_seqlens_k, got None")
    like(op, "cu_seqlens", ends, cu_seqlens_k=ends_k)
    sequences(op, "q", x, ends_k, max_seqlen_k, "_k")


def written(op: str, first: str, x: Tensor, /, **tensors: Tensor) -> None:
    """Outputs that the caller made, of x's shape, dtype and device, with an element for each index."""
    like(op, first, x, **tensors)
    for name, t in tensors.items():
        if any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride(), strict=True)):
            raise ValueError(
                f"{op}: {name} is written and must have an element for each index, got strides {list(t.stride())}"
            )


def lse_shape(q: Tensor) -> tuple[int, ...]:
    """[B, H, N] of q [B, N, H, D]; [H, total] of [total, H, D]."""
    return (*q.shape[:-3], q.shape[-2], q.shape[-3])


def lse(op: str, q: Tensor, lse: Tensor, backend: str) -> None:
    """[B, H, N] or [H, total], or empty from a backend whose attention returns none."""
    if BACKENDS[backend].exposes_lse_on(q.device.type):
        expected = lse_shape(q)
        if tuple(lse.shape) != expected:
            layout = "[B, H, N]" if q.dim() == 4 else "[H, total]"
            raise ValueError(f"{op}: lse must have shape {list(expected)} (q's {layout}), got {shape_of(lse)}")
    device(op, "q", q, lse=lse)
    floating(op, lse=lse)


def norm_backward(op: str, grad_y: Tensor, x: Tensor, weight: Tensor, **statistics: Tensor) -> None:
    """The backward of a norm over x's last dimension; `statistics` of each row."""
    rows(op, "x", x)
    floating(op, x=x)
    like(op, "x", x, grad_y=grad_y)
    parameters(op, "x", x, x.shape[-1], "x's last dimension", weight=weight)
    leading(op, "x", x, x.dim() - 1, "rows", **statistics)
