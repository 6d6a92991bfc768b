"""What a block reports of its attention instead of the map: the class token's row, or the sums over the columns.

Both come from the q and k that the block's own attention multiplies, in the forward itself: no projection and no norm
runs again. The class token's row is N of the N^2 scores of a head. The sums over the columns are q k^T once more,
against forward's log-sum-exp (`internvit.ops.attention_column_sums`).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvit.ops import attention_column_sums, qk_norm, qk_norm_stats
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.sequences import Sequences
from internvit.ops.qk_norm_attention import qk_norm_attention_with_statistics


class Folded(NamedTuple):
    """QK-norm that attention takes inside: weights [C] of q and k, eps and rounding."""

    q_weight: Tensor
    k_weight: Tensor
    eps: float
    rounding: str


class AttentionSummary:
    """Collects what one block reports of the images that go through it, at once or in pieces.

    Args:
        kind: "class" or "columns".
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._values: list[Tensor] = []

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, norm: Folded | None, scale: float | None, sequences: Sequences | None
    ) -> Tensor:
        """Attention's output [B, N, H, D], or [total, H, D] of packed images, with the bits that it always has."""
        q_weight, k_weight, eps, rounding = norm or (None, None, 1e-6, "fused")
        statistics = qk_norm_attention_with_statistics(q, k, v, q_weight, k_weight, eps, rounding, scale, sequences)
        out, lse, rstd = statistics
        if self.kind == "class":
            self._add_class_rows(q, k, norm, scale, sequences)
            return out
        inside: Any = ()
        if norm is not None and rstd is not None:
            inside = norm.q_weight, norm.k_weight, *rstd
        elif norm is not None:
            normed = qk_norm(
                _as_image(q), _as_image(k), norm.q_weight, norm.k_weight, eps=norm.eps, rounding=norm.rounding
            )
            q, k = normed[0].view(q.shape), normed[1].view(k.shape)
        packed: dict[str, Any] = {} if sequences is None else sequences.settings()
        sums = attention_column_sums(q, k, lse, *inside, scale=scale, **packed)
        if sequences is None:
            self.add(sums)
        else:
            self._values += [sums[None, :, tokens] for tokens in sequences.slices()]
        return out

    def _add_class_rows(
        self, q: Tensor, k: Tensor, norm: Folded | None, scale: float | None, sequences: Sequences | None
    ) -> None:
        q, k, rstd = _as_image(q), _as_image(k), None
        if norm is not None:
            rstd = qk_norm_stats(q, k, eps=norm.eps)
        pieces = [slice(None)] if sequences is None else sequences.slices()
        for tokens in pieces:
            statistics = None if rstd is None else (rstd[0][:, tokens], rstd[1][:, tokens])
            self.add(_class_row(q[:, tokens], k[:, tokens], norm, statistics, scale))

    def add(self, value: Tensor) -> None:
        """A piece [b, H, N] of the batch, or an image [1, H, N] of a pack."""
        self._values.append(value)

    def of_batch(self) -> Tensor:
        """[B, H, N]."""
        return self._values[0] if len(self._values) == 1 else torch.cat(self._values)

    def of_images(self) -> list[Tensor]:
        """[H, N_i] of each packed image."""
        return [value[0] for value in self._values]


def _as_image(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x[None]


def _class_row(
    q: Tensor, k: Tensor, norm: Folded | None, rstd: tuple[Tensor, Tensor] | None, scale: float | None
) -> Tensor:
    """softmax(q_0 k^T * scale) [B, H, N] in q's dtype, from scores in float32."""
    dtype, first = accumulate_dtype(q), q[:, 0]  # [B, H, D]
    first = first.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if norm is not None and rstd is not None:
        weight = norm.q_weight.to(dtype) * norm.k_weight.to(dtype)
        first = first * rstd[0][:, :1, None].to(dtype) * weight.view(first.shape[1:])
    scores = torch.einsum("bhd,bnhd->bhn", first, k.to(dtype))
    if rstd is not None:
        scores = scores * rstd[1][:, None].to(dtype)
    return scores.softmax(-1).to(q.dtype)
