"""A key-padding mask for attention of packed sequences, which no kernel has to know.

The tokens of each image are parted: those that are there, then the padding. Each image becomes two sequences, and one
that attends to the first of them alone has no padding among its keys. All B * N rows are kept, so that no size depends
on the values of the mask: nothing is read back from a device, and a compiled graph takes any mask.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvit.ops.core.validation import shape_of


class Padding(NamedTuple):
    """Where the rows of padded batches [B, N, ...] go in a pack [B * N, ...].

    Attributes:
        mask: bool [B, N], True for padding.
        places: the row of the pack [B * N] for each row of the batch.
        order: the row of the batch for each row of the pack.
        ends: int32 [2 B + 1], the ends of the sequences, two for each image.
    """

    mask: Tensor
    places: Tensor
    order: Tensor
    ends: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> "Padding":
        images, tokens = mask.shape
        first = torch.arange(images, device=mask.device)[:, None] * tokens
        lengths = tokens - mask.sum(1)
        there, padding = (~mask).cumsum(1) - 1, lengths[:, None] + mask.cumsum(1) - 1
        places = (first + torch.where(mask, padding, there)).flatten()
        # Not a sort, which takes longer and which ONNX has none of.
        order = torch.zeros_like(places).scatter(0, places, torch.arange(images * tokens, device=mask.device))
        return cls(mask, places, order, sequence_ends(lengths, tokens))

    def pack(self, x: Tensor, value: float) -> Tensor:
        """x [B, N, ...] as [B * N, ...]; padding is `value`, and gets no gradient, whatever it held."""
        padding = self.mask.flatten()[self.order].view(-1, *[1] * (x.dim() - 2))
        return x.flatten(0, 1).index_select(0, self.order).masked_fill(padding, value)

    def pack_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Heads whose padding attends to itself, and can be normalised."""
        return self.pack(q, 1.0), self.pack(k, 1.0), self.pack(v, 0.0)

    def unpack(self, x: Tensor) -> Tensor:
        """`pack` undone, with 0 for padding."""
        rows = x.index_select(0, self.places).unflatten(0, self.mask.shape)
        return rows.masked_fill(self.mask.view(*self.mask.shape, *[1] * (x.dim() - 1)), 0.0)


def sequence_ends(lengths: Tensor, tokens: int) -> Tensor:
    """int32 [2 B + 1] of images of `tokens` rows, of which the first lengths [B] are one sequence, the rest another."""
    first = torch.arange(lengths.shape[0] + 1, device=lengths.device) * tokens
    inner = torch.stack([first[:-1], first[:-1] + lengths], 1).flatten()
    return torch.cat([inner, first[-1:]]).to(torch.int32)


def without_padding(out: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """out [B, N, H, D] of a batch whose queries and keys are the same tokens."""
    return out if key_padding_mask is None else out.masked_fill(key_padding_mask[:, :, None, None], 0.0)


def check_key_padding_mask(op: str, mask: Any, q: Any, k: Any, *cu_seqlens: Any) -> None:
    """bool [B, N_k] on q's device, beside padded batches."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{op}: key_padding_mask must be a torch.Tensor, got {type(mask).__name__}")
    if any(ends is not None for ends in cu_seqlens):
        raise ValueError(f"{op}: key_padding_mask must be None beside cu_seqlens: packed sequences have no padding")
    for name, t in (("q", q), ("k", k)):
        if isinstance(t, Tensor) and t.dim() != 4:
            raise ValueError(f"{op}: {name} must have shape [B, N, H, D] beside key_padding_mask, got {shape_of(t)}")
    if mask.dtype != torch.bool:
        raise ValueError(f"{op}: key_padding_mask must be torch.bool, True for padding, got {mask.dtype}")
    if isinstance(k, Tensor) and mask.shape != k.shape[:2]:
        raise ValueError(
            f"{op}: key_padding_mask must have shape {list(k.shape[:2])} (k's [B, N]), got {shape_of(mask)}"
        )
    if isinstance(q, Tensor) and mask.device != q.device:
        raise ValueError(f"{op}: key_padding_mask must be on q's device {q.device}, got {mask.device}")
