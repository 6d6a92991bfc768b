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


def _softmax(scores: Tensor, sequences: Sequences | None) -> Tensor:
    """Probabilities, 0 where a sequence has no key."""
    lacks_keys = None if sequences is None else sequences.lacks_keys()
    return scores.softmax(-1) if lacks_keys is None else scores.softmax(-1).masked_fill(lacks_keys, 0.0)


def _pad_heads(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Heads:
    return sequences.pad(q), sequences.keys.pad(k), sequences.keys.pad(v)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    """Packed sequences are padded: nothing is read back from a device, and graphs take any lengths."""
    total = q.shape[0]
    if sequences is not None:
        q, k, v = _pad_heads(q, k, v, sequences)
        qk_norm = qk_norm and qk_norm.pad(sequences)
    scores = _scores(*_normed(q, k, qk_norm), scale, sequences)
    # Not exp(scores - lse): the rounding of a large lse would be a factor of every probability.
    out = (_softmax(scores, sequences) @ heads_first(v)).transpose(1, 2).to(q.dtype)
    lse = scores.logsumexp(-1)
    if sequences is None:
        return out.contiguous(), lse
    lacks_keys = sequences.lacks_keys()
    if lacks_keys is not None:
        lse = lse.masked_fill(lacks_keys[..., 0], -float("inf"))
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
    grad_out, out = sequences.pad(grad_out), sequences.pad(out)
    q, k, v = _pad_heads(q, k, v, sequences)
    filled = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    result = _backward(grad_out, q, k, v, out, scale, qk_norm and qk_norm.pad(sequences), sequences, filled)
    for destination, grad, of in zip(grads, filled, (sequences, sequences.keys, sequences.keys), strict=True):
        destination.copy_(of.unpad(grad, destination.shape[0]))
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
    probabilities = _softmax(_scores(q_hat, k_hat, scale, sequences), sequences)
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Attention of [B, N, H, D] in plain PyTorch; of packed sequences one by one."""
    if cu_seqlens is not None:
        ends_k = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        ends = ((q, cu_seqlens), (k, ends_k), (v, ends_k))
        sequences = zip(*(t.tensor_split(end[1:-1].tolist()) for t, end in ends), strict=True)
        return torch.cat([formula(q[None], k[None], v[None], scale)[0] for q, k, v in sequences])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-1, -2)
    if key_padding_mask is None:
        return (scores.softmax(-1) @ v).transpose(1, 2)
    padding = key_padding_mask[:, None, None]
    scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)  # -inf in all of a row would be NaN
    return (scores.softmax(-1).masked_fill(padding, 0.0) @ v).transpose(1, 2)


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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
) -> Tensor:
    """Attention of [B, N, H, D], or of packed sequences padded, by PyTorch's function."""
    total, mask, lacks_keys = q.shape[0], None, None
    qk_norm = all_or_none(q_weight, k_weight, rstd_q, rstd_k)
    sequences = pack(cu_seqlens, max_seqlen, total, cu_seqlens_k, max_seqlen_k, k.shape[0])
    if sequences is not None:
        lacks_keys = sequences.lacks_keys()
        q, k, v = _pad_heads(q, k, v, sequences)
        qk_norm, mask = qk_norm and qk_norm.pad(sequences), sequences.mask()
    q_hat, k_hat = _normed(q, k, qk_norm)
    out = F.scaled_dot_product_attention(q_hat.to(q.dtype), k_hat.to(q.dtype), v.transpose(1, 2), mask, scale=scale)
    out = out if lacks_keys is None else out.masked_fill(lacks_keys, 0.0)
    return out.transpose(1, 2) if sequences is None else sequences.unpad(out.transpose(1, 2), total)
