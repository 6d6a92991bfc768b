"""Attention in plain PyTorch, forward and backward: the reference, the formula, and what exported graphs hold.

Scores, softmax and sums are in float32 (float64 for float64 input), as in every backend.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.sequences import Sequences, pack

Heads = tuple[Tensor, Tensor, Tensor]


class QKNorm(NamedTuple):
    """QK-norm inside attention: weights [H * D] and statistics [B, N], or [total]."""

    q_weight: Tensor
    k_weight: Tensor
    rstd_q: Tensor
    rstd_k: Tensor

    def pad(self, sequences: Sequences) -> "QKNorm":
        return self._replace(rstd_q=sequences.pad(self.rstd_q), rstd_k=sequences.pad(self.rstd_k))


class SavedAttention(NamedTuple):
    """What attention keeps for backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    qk_norm: QKNorm | None
    sequences: Sequences | None = None


class QKNormGrads(NamedTuple):
    """Gradients of the weights [H * D], and of the statistics' chain: row_dot_q[b, h, n] = sum_d grad_q_hat * q_hat.

    row_dot_q and row_dot_k are [B, H, N], or [H, total].
    """

    q_weight: Tensor
    k_weight: Tensor
    row_dot_q: Tensor
    row_dot_k: Tensor


def heads_first(x: Tensor, weight: Tensor | None = None, rstd: Tensor | None = None) -> Tensor:
    """x, or x * rstd * weight, as [B, H, N, D] in the accumulation dtype."""
    x = x.to(accumulate_dtype(x))
    if weight is not None and rstd is not None:
        x = x * rstd.to(x.dtype)[:, :, None, None] * weight.to(x.dtype).view(x.shape[2], x.shape[3])
    return x.transpose(1, 2)


def _normed(q: Tensor, k: Tensor, qk_norm: QKNorm | None) -> tuple[Tensor, Tensor]:
    if qk_norm is None:
        return heads_first(q), heads_first(k)
    return heads_first(q, qk_norm.q_weight, qk_norm.rstd_q), heads_first(k, qk_norm.k_weight, qk_norm.rstd_k)


def _scores(q_hat: Tensor, k_hat: Tensor, scale: float, sequences: Sequences | None) -> Tensor:
    scores = q_hat @ k_hat.transpose(-1, -2) * scale
    return scores if sequences is None else scores.masked_fill(~sequences.mask(), -float("inf"))


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """Packed sequences are padded: nothing is read back from a device, and graphs take any lengths."""
    total = q.shape[0]
    if sequences is not None:
        q, k, v = map(sequences.pad, (q, k, v))
        qk_norm = qk_norm and qk_norm.pad(sequences)
    scores = _scores(*_normed(q, k, qk_norm), scale, sequences)
    # Not exp(scores - lse): the rounding of a large lse would be a factor of every probability.
    out = (scores.softmax(-1) @ heads_first(v)).transpose(1, 2).to(q.dtype)
    lse = scores.logsumexp(-1)
    if sequences is None:
        return out.contiguous(), lse
    return sequences.unpad(out, total), _unpad_rows(lse, sequences, total)


def _unpad_rows(x: Tensor, sequences: Sequences, total: int) -> Tensor:
    """x [B, H, max_seqlen] as [H, total]."""
    return sequences.unpad(x.transpose(1, 2), total).t().contiguous()


def column_sums_reference(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, qk_norm: QKNorm | None, sequences: Sequences | None = None
) -> Tensor:
    """sum_i exp(S_ij - lse_i) [B, H, N], or [H, total]; no probability is more than 1, whatever lse's rounding is."""
    if sequences is None:
        return _probabilities(_scores(*_normed(q, k, qk_norm), scale, None), lse).sum(-2)
    total, there = q.shape[0], sequences.tokens()[:, None, :, None]
    q, k, lse = sequences.pad(q), sequences.pad(k), sequences.pad(lse.t()).transpose(1, 2)
    scores = _scores(*_normed(q, k, qk_norm and qk_norm.pad(sequences)), scale, sequences)
    return _unpad_rows(_probabilities(scores, lse).masked_fill(~there, 0).sum(-2), sequences, total)


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    return (scores - lse.to(scores.dtype)[..., None]).clamp(max=0).exp()


def attention_backward_reference(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> QKNormGrads | None:
    """Fills grads, rstd held fixed.

    row_dot_q[b, h, n] = sum_d grad_q_hat * q_hat = sum_j dS_ij S_ij, and over i for k: what the gradient of rstd needs.
    """
    q, k, v, out, _, scale, qk_norm, sequences = saved
    if sequences is not None:
        return _packed_backward(grad_out, saved, sequences, grads)
    return _backward(grad_out, q, k, v, out, scale, qk_norm, None, grads)


def _packed_backward(grad_out: Tensor, saved: SavedAttention, sequences: Sequences, grads: Heads) -> QKNormGrads | None:
    q, k, v, out, _, scale, qk_norm, _ = saved
    total = q.shape[0]
    grad_out, q, k, v, out = map(sequences.pad, (grad_out, q, k, v, out))
    filled = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    result = _backward(grad_out, q, k, v, out, scale, qk_norm and qk_norm.pad(sequences), sequences, filled)
    for destination, grad in zip(grads, filled, strict=True):
        destination.copy_(sequences.unpad(grad, total))
    if result is None:
        return None
    row_dots = (_unpad_rows(dot, sequences, total) for dot in (result.row_dot_q, result.row_dot_k))
    return QKNormGrads(result.q_weight, result.k_weight, *row_dots)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    qk_norm: QKNorm | None,
    sequences: Sequences | None,
    grads: Heads,
) -> QKNormGrads | None:
    q_hat, k_hat = _normed(q, k, qk_norm)
    values, grad = heads_first(v), heads_first(grad_out)
    probabilities = _scores(q_hat, k_hat, scale, sequences).softmax(-1)
    delta = (grad * heads_first(out)).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad @ values.transpose(-1, -2) - delta) * scale
    grad_q_hat, grad_k_hat = grad_scores @ k_hat, grad_scores.transpose(-1, -2) @ q_hat
    grads[2].copy_((probabilities.transpose(-1, -2) @ grad).transpose(1, 2))
    if qk_norm is None:
        grads[0].copy_(grad_q_hat.transpose(1, 2))
        grads[1].copy_(grad_k_hat.transpose(1, 2))
        return None
    q_weight = _unfold(grad_q_hat, q, qk_norm.q_weight, qk_norm.rstd_q, grads[0])
    k_weight = _unfold(grad_k_hat, k, qk_norm.k_weight, qk_norm.rstd_k, grads[1])
    return QKNormGrads(q_weight, k_weight, (grad_q_hat * q_hat).sum(-1), (grad_k_hat * k_hat).sum(-1))


def _unfold(grad_x_hat: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_x: Tensor) -> Tensor:
    """Fills grad_x, rstd held fixed; returns the weight's gradient."""
    by_token = grad_x_hat.transpose(1, 2) * rstd.to(grad_x_hat.dtype)[:, :, None, None]
    grad_x.copy_(by_token * weight.to(grad_x_hat.dtype).view(x.shape[2], x.shape[3]))
    return (by_token * x).sum((0, 1)).flatten().to(weight.dtype)


def all_or_none(
    q_weight: Tensor | None, k_weight: Tensor | None, rstd_q: Tensor | None, rstd_k: Tensor | None
) -> QKNorm | None:
    """QK-norm where all of it is given."""
    if q_weight is None or k_weight is None or rstd_q is None or rstd_k is None:
        return None
    return QKNorm(q_weight, k_weight, rstd_q, rstd_k)


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attention of [B, N, H, D] in plain PyTorch; of packed sequences one by one."""
    if cu_seqlens is not None:
        sequences = zip(*(t.tensor_split(cu_seqlens[1:-1].tolist()) for t in (q, k, v)), strict=True)
        return torch.cat([formula(q[None], k[None], v[None], scale)[0] for q, k, v in sequences])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (((q * scale) @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)


def portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rstd_q: Tensor | None = None,
    rstd_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Attention of [B, N, H, D], or of packed sequences padded, by PyTorch's function."""
    total, mask = q.shape[0], None
    qk_norm, sequences = all_or_none(q_weight, k_weight, rstd_q, rstd_k), pack(cu_seqlens, max_seqlen, total)
    if sequences is not None:
        q, k, v = map(sequences.pad, (q, k, v))
        qk_norm, mask = qk_norm and qk_norm.pad(sequences), sequences.mask()
    q_hat, k_hat = _normed(q, k, qk_norm)
    out = F.scaled_dot_product_attention(q_hat.to(q.dtype), k_hat.to(q.dtype), v.transpose(1, 2), mask, scale=scale)
    return out.transpose(1, 2) if sequences is None else sequences.unpad(out.transpose(1, 2), total)
