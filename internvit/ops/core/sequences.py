"""Packed sequences: the tokens of images of any sizes, one image after the other, without padding.

cu_seqlens int32 [B + 1] and max_seqlen are flash-attn's: sequence b is tokens cu_seqlens[b] to cu_seqlens[b + 1] of
[total, ...], and max_seqlen is the length of the longest one or more. A sequence may be empty. Keys and values of
plain attention may have sequences of their own, as many: cu_seqlens_k and max_seqlen_k.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvit.ops.core.direct import PLAIN


class Sequences(NamedTuple):
    """Where sequences begin and end: int32 [B + 1]; an upper bound of their lengths. Those of keys where not None."""

    cu_seqlens: Tensor
    max_seqlen: int
    cu_seqlens_k: Tensor | None = None
    max_seqlen_k: int | None = None

    def settings(self) -> dict[str, Any]:
        """The arguments of an attention op whose queries are their own keys."""
        return {"cu_seqlens": self.cu_seqlens, "max_seqlen": self.max_seqlen}

    @property
    def keys(self) -> "Sequences":
        """The sequences of keys and values."""
        if self.cu_seqlens_k is None or self.max_seqlen_k is None:
            return self
        return Sequences(self.cu_seqlens_k, self.max_seqlen_k)

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    def lacks_keys(self) -> Tensor | None:
        """Which sequences have no key, bool [B, 1, 1, 1]; None where queries are their own keys."""
        return None if self.cu_seqlens_k is None else (self.keys.lengths == 0)[:, None, None, None]

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

    def mask(self) -> Tensor:
        """What may attend to what in a padded batch, bool [B, 1, max_seqlen, max_seqlen of keys].

        Tokens attend within their sequence. Padding attends to everything, as do tokens without keys, so that no row of
        a softmax is empty.
        """
        queries, keys = self.tokens(), self.keys.tokens()
        mask = (keys[:, None, :] | ~queries[:, :, None])[:, None]
        lacks_keys = self.lacks_keys()
        return mask if lacks_keys is None else mask | lacks_keys

    def tokens(self) -> Tensor:
        """Where a padded batch has tokens, bool [B, max_seqlen]."""
        return torch.arange(self.max_seqlen, device=self.cu_seqlens.device) < self.lengths[:, None]


def pack(
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    total: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    total_k: int = 0,
) -> Sequences | None:
    """None without cu_seqlens; no sequence is longer than the tokens there are."""
    if cu_seqlens is None or max_seqlen is None:
        return None
    longest: Any = torch.sym_min(max_seqlen, total)
    if cu_seqlens_k is None or max_seqlen_k is None:
        return Sequences(cu_seqlens, longest)
    longest_k: Any = torch.sym_min(max_seqlen_k, total_k)
    return Sequences(cu_seqlens, longest, cu_seqlens_k, longest_k)


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


def check_values(op: str, cu_seqlens: Tensor | None, max_seqlen: int | None, total: int, of: str = "") -> None:
    """Raises a ValueError for a wrong cu_seqlens; on a GPU its values are not read, which would wait for the device.

    `of` is "_k" for those of keys.
    """
    if cu_seqlens is None or max_seqlen is None or not readable(cu_seqlens):
        return
    ends, name = cu_seqlens.tolist(), f"{op}: cu_seqlens{of}"
    if ends[0] != 0 or ends[-1] != total:
        raise ValueError(f"{name} must begin with 0 and end with {total} (tokens), got {_short(ends)}")
    lengths = [end - start for start, end in pairwise(ends)]
    if min(lengths, default=0) < 0:
        raise ValueError(f"{name} must not decrease, got {_short(ends)}")
    longest = max(lengths, default=0)
    if longest > max_seqlen:
        raise ValueError(f"{op}: max_seqlen{of} must be at least {longest} (the longest sequence), got {max_seqlen}")


def _short(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"
