"""Packed sequences: the tokens of images of any sizes, one image after the other, without padding.

cu_seqlens int32 [B + 1] and max_seqlen are flash-attn's: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] of
[total, ...], and max_seqlen is the length of the longest one or more. A sequence may be empty.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvit.ops.core.direct import PLAIN


class Sequences(NamedTuple):
    """Where sequences begin and end: int32 [B + 1]; an upper bound of their lengths."""

    cu_seqlens: Tensor
    max_seqlen: int

    def slices(self) -> list[slice]:
        """The tokens of each sequence. On a GPU this waits for the device."""
        ends = self.cu_seqlens.tolist()
        return [slice(*pair) for pair in pairwise(ends)]

    def pad(self, x: Tensor) -> Tensor:
        """x [total, ...] as [B, max_seqlen, ...] with zeros after each sequence; reads nothing back from a device."""
        starts, ends = (t.long()[:, None] for t in (self.cu_seqlens[:-1], self.cu_seqlens[1:]))
        rows = starts + torch.arange(self.max_seqlen, device=x.device)
        rows = torch.where(rows < ends, rows, x.shape[0])
        return torch.cat([x, x.new_zeros((1, *x.shape[1:]))])[rows]

    def unpad(self, x: Tensor, total: int) -> Tensor:
        """`pad` undone: x [B, max_seqlen, ...] as [total, ...]."""
        tokens = torch.arange(total, device=x.device)
        sequence = (tokens[:, None] >= self.cu_seqlens[1:]).sum(1).clamp(max=max(x.shape[0] - 1, 0))
        rows = sequence * self.max_seqlen + tokens - self.cu_seqlens[sequence]
        return x.flatten(0, 1)[rows]

    def tokens(self) -> Tensor:
        """Where a padded batch has tokens, bool [B, max_seqlen]."""
        lengths = self.cu_seqlens[1:] - self.cu_seqlens[:-1]
        return torch.arange(self.max_seqlen, device=lengths.device) < lengths[:, None]

    def mask(self) -> Tensor:
        """What may attend to what in a padded batch, bool [B, 1, max_seqlen, max_seqlen].

        Tokens attend within their sequence. Padding attends to everything, so that no row of a softmax is empty.
        """
        there = self.tokens()
        return (there[:, None, :] | ~there[:, :, None])[:, None]


def pack(cu_seqlens: Tensor | None, max_seqlen: int | None, total: int) -> Sequences | None:
    """None without cu_seqlens; no sequence is longer than the tokens there are."""
    if cu_seqlens is None or max_seqlen is None:
        return None
    longest: Any = torch.sym_min(max_seqlen, total)
    return Sequences(cu_seqlens, longest)


def readable(cu_seqlens: Tensor) -> bool:
    """Whether its values can be read at once: on a CPU, and not while a graph is made."""
    making_graph = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    return not making_graph and type(cu_seqlens) in PLAIN and cu_seqlens.device.type == "cpu"


def default_max_seqlen(x: Any, cu_seqlens: Any, max_seqlen: int | None) -> int | None:
    """The longest sequence where it can be read at once, else the number of tokens; None where validation will say."""
    if max_seqlen is not None or not isinstance(cu_seqlens, Tensor) or not isinstance(x, Tensor) or x.dim() == 0:
        return max_seqlen
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or not readable(cu_seqlens):
        return x.shape[0]
    return int(cu_seqlens.diff().max())


def check_values(op: str, cu_seqlens: Tensor | None, max_seqlen: int | None, total: int) -> None:
    """Raises a ValueError for a wrong cu_seqlens; on a GPU its values are not read, which would wait for the device."""
    if cu_seqlens is None or max_seqlen is None or not readable(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total:
        raise ValueError(f"{op}: cu_seqlens must begin with 0 and end with {total} (tokens), got {_short(ends)}")
    lengths = [end - start for start, end in pairwise(ends)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"{op}: cu_seqlens must not decrease, got {_short(ends)}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"{op}: max_seqlen must be at least {max(lengths)} (the longest sequence), got {max_seqlen}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
