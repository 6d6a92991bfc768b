"""Layouts in memory that a caller's tensors have: same values, other strides, other alignment."""

from torch import Tensor

LAYOUTS = ("contiguous", "every_second", "sliced", "batch_inside", "channels_first", "expanded", "offset")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """t [B, ...] of two dimensions or more, in `layout`; "expanded" repeats its first image."""
    *leading, width = t.shape
    if layout == "contiguous":
        return t.contiguous()
    if layout == "every_second":
        return t.new_empty(*leading, 2 * width)[..., ::2].copy_(t)
    if layout == "sliced":
        return t.new_empty(*leading, width + 3)[..., 1 : 1 + width].copy_(t)
    if layout == "batch_inside":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels_first":
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "offset":
        return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
    raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
