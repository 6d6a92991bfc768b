"""QK-norm over the heads of all ranks, by an all-reduce of two float32 numbers a token: q and k stay where they are.

    mean(q^2) + eps = sum over ranks r of (C_r / C) * rstd_r^-2,   rstd_r = 1 / sqrt(mean over r's heads of q^2 + eps)

The weights C_r / C add up to 1, and so do the parts of eps. Backward is one more all-reduce of this size: each rank's
heads give a part of the gradient of rstd. Gathering q and k would move 2 * C numbers a token, 3,200 times as many for
the 6B.
"""

import torch
from torch import Tensor

from internvit.ops import attention, qk_norm_stats
from internvit.ops.backends.registry import BACKENDS
from internvit.ops.core.select import resolve
from internvit.parallel.group import RankGroup, sum_shared


def shared_qk_norm_stats(q: Tensor, k: Tensor, channels: int, eps: float, group: RankGroup) -> tuple[Tensor, Tensor]:
    """rstd_q and rstd_k [B, N] over the heads of all ranks.

    Args:
        q, k: [B, N, H, D], this rank's heads.
        channels: C, of all ranks together.
        eps: of QK-norm.
    """
    share = q.shape[2] * q.shape[3] / channels
    local = torch.stack(qk_norm_stats(q, k, eps=eps))  # [2, B, N]
    rstd_q, rstd_k = sum_shared(local.pow(-2) * share, group).rsqrt().unbind(0)
    return rstd_q, rstd_k


def shared_qk_norm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    channels: int,
    eps: float,
    scale: float,
    rounding: str,
    group: RankGroup,
) -> Tensor:
    """`internvit.ops.qk_norm_attention` of this rank's heads, with the statistics of all."""
    rstd_q, rstd_k = shared_qk_norm_stats(q, k, channels, eps, group)
    backend = resolve("attention", q, None, q.shape[-1], caller="qk_norm_attention")
    if rounding == "fused" and BACKENDS[backend].folds_qk_norm:
        return attention(q, k, v, q_weight, k_weight, rstd_q, rstd_k, scale=scale, backend=backend)
    q, k = _normalize(q, q_weight, rstd_q, rounding), _normalize(k, k_weight, rstd_k, rounding)
    return attention(q, k, v, scale=scale, backend=backend)


def _normalize(x: Tensor, weight: Tensor, rstd: Tensor, rounding: str) -> Tensor:
    """x * rstd * weight [B, N, H, D], rounded to x's dtype once, or also before the weight."""
    x_hat = x.to(rstd.dtype) * rstd[:, :, None, None]
    weight = weight.view(x.shape[2:])
    return (x_hat.to(x.dtype) * weight if rounding == "reference" else x_hat * weight).to(x.dtype)
