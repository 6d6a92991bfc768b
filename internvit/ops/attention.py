"""Attention over one image's tokens, with QK-norm inside when its weights and statistics are given.

    out[b, :, h] = softmax(q_hat k_hat^T * scale) v
    q_hat = q * rstd_q[b, n] * q_weight[h * D + d],  k_hat alike;  q_hat = q, k_hat = k without weights

q, k, v [B, N, H, D], contiguous in D, any other strides; q_weight, k_weight [H * D]; rstd_q, rstd_k [B, N] float32;
out [B, N, H, D] contiguous, so that out.flatten(2) is the projection's input; lse [B, H, N] float32, the natural
logarithm of each softmax row's sum (empty where a backend does not expose it). rstd is an input like any other: it has
a gradient, and `qk_norm_attention` closes the chain.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import BACKENDS, implementation, reference, resolve

OP = "attention"


def normalized(x: Tensor, weight: Tensor | None, rstd: Tensor | None) -> Tensor:
    """x, or x * rstd * weight, as [B, H, N, D] in the accumulation dtype."""
    x = x.to(accumulate_dtype(x))
    if weight is not None and rstd is not None:
        x = x * rstd[:, :, None, None] * weight.to(x.dtype).view(x.shape[2], x.shape[3])
    return x.transpose(1, 2)


@reference(OP)
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    scores = normalized(q, q_weight, rstd_q) @ normalized(k, k_weight, rstd_k).transpose(-1, -2) * scale
    # Not exp(scores - lse): the rounding of a large lse would be a factor of every probability.
    out = scores.softmax(-1) @ normalized(v, None, None)
    return out.transpose(1, 2).to(q.dtype).contiguous(), scores.logsumexp(-1)


@reference(f"{OP}_backward")
def attention_backward_reference(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fills grad_q, grad_k, grad_v (rstd held fixed); returns grad_q_weight, grad_k_weight and the row dots.

    row_dot_q[b, h, n] = sum_d grad_q_hat * q_hat = sum_j dS_ij S_ij, and over i for k: what the gradient of rstd needs.
    """
    q_hat, k_hat = normalized(q, q_weight, rstd_q), normalized(k, k_weight, rstd_k)
    values, grad = normalized(v, None, None), normalized(grad_out, None, None)
    probabilities = (q_hat @ k_hat.transpose(-1, -2) * scale).softmax(-1)
    delta = (grad * normalized(out, None, None)).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad @ values.transpose(-1, -2) - delta) * scale
    grad_v.copy_((probabilities.transpose(-1, -2) @ grad).transpose(1, 2))
    results = []
    for x, x_hat, grad_x_hat, weight, rstd, grad_x in (
        (q, q_hat, grad_scores @ k_hat, q_weight, rstd_q, grad_q),
        (k, k_hat, grad_scores.transpose(-1, -2) @ q_hat, k_weight, rstd_k, grad_k),
    ):
        if weight is None or rstd is None:
            grad_x.copy_(grad_x_hat.transpose(1, 2))
            results.append((empty_grad(x), empty_grad(x)))
            continue
        grad_x_hat_by_token = grad_x_hat.transpose(1, 2) * rstd[:, :, None, None]
        grad_x.copy_(grad_x_hat_by_token * weight.to(grad_x_hat.dtype).view(x.shape[2], x.shape[3]))
        grad_weight = (grad_x_hat_by_token * x).sum((0, 1)).flatten().to(weight.dtype)
        results.append((grad_weight, (grad_x_hat * x_hat).sum(-1)))
    (grad_q_weight, row_dot_q), (grad_k_weight, row_dot_k) = results
    return grad_q_weight, grad_k_weight, row_dot_q, row_dot_k


class AttentionFunction(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, scale, q_weight, k_weight, rstd_q, rstd_k, backend = args
        out, lse = below_autograd(ATTENTION, *args)
        ctx.save_for_backward(q, k, v, out, lse, q_weight, k_weight, rstd_q, rstd_k)
        ctx.scale, ctx.backend = scale, backend
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        *tensors, q_weight, k_weight, rstd_q, rstd_k = ctx.saved_tensors
        grads = ATTENTION_BACKWARD(grad_out, *tensors, ctx.scale, q_weight, k_weight, rstd_q, rstd_k, ctx.backend)
        needs = ctx.needs_input_grad
        grads = wanted(grads, needs[:3] + needs[4:8])
        return (*grads[:3], None, *grads[3:], None)


def _run_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
    backend: str,
) -> tuple[Tensor, ...]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    grad_q_weight, grad_k_weight, row_dot_q, row_dot_k = implementation(f"{OP}_backward", backend)(
        grad_out, q, k, v, out, lse, scale, q_weight, k_weight, rstd_q, rstd_k, *grads
    )
    if rstd_q is None or rstd_k is None:
        return (*grads, *(empty_grad(q) for _ in range(4)))
    return (*grads, grad_q_weight, grad_k_weight, row_dot_q.sum(1) / rstd_q, row_dot_k.sum(1) / rstd_k)


def fake_out_and_lse(q: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    lse_shape = (batch, heads, tokens) if BACKENDS[backend].exposes_lse_on(q.device.type) else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=accumulate_dtype(q))


def _fake_backward(  # type: ignore[no-untyped-def]
    grad_out, q, k, v, out, lse, scale, q_weight, k_weight, rstd_q, rstd_k, backend
):
    grads = tuple(t.new_empty(t.shape) for t in (q, k, v))
    return (
        *grads,
        *(empty_grad(q) if t is None else t.new_empty(t.shape) for t in (q_weight, k_weight, rstd_q, rstd_k)),
    )


ATTENTION = define(
    f"{OP}(Tensor q, Tensor k, Tensor v, float scale, Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q,"
    " Tensor? rstd_k, str backend) -> (Tensor out, Tensor lse)",
    fake=lambda q, k, v, scale, q_weight, k_weight, rstd_q, rstd_k, backend: fake_out_and_lse(q, backend),
    autograd=AttentionFunction,
)
ATTENTION_BACKWARD = define(
    f"{OP}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q, Tensor? rstd_k, str backend)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_weight, Tensor grad_k_weight,"
    " Tensor grad_rstd_q, Tensor grad_rstd_k)",
    fake=_fake_backward,
    run=_run_backward,
)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast casts float32 operands of a matrix product to its dtype, as torch does for its own."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype == torch.float32 else t for t in tensors)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rstd_q: Tensor | None = None,
    rstd_k: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention without mask or dropout; with weights and statistics, QK-norm happens inside.

    out = softmax(q_hat k_hat^T * scale) v,  q_hat = q * rstd_q * q_weight,  k_hat = k * rstd_k * k_weight

    Args:
        q, k, v: [B, N, H, D], one dtype and device, contiguous in D (views of a packed [B, N, 3, H, D] need no copy).
        scale: of the scores; 1 / sqrt(D) by default.
        q_weight, k_weight: [H * D], q's dtype or float32, QK-norm's weights over all heads.
        rstd_q, rstd_k: [B, N], from `qk_norm_stats`. All four are given, or none.
        backend: overrides `internvit.backend`; "sdpa" and "flash" exist for attention alone and take no weights.

    Returns:
        out: [B, N, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: Vaswani et al. 2017; InternAttention in OpenGVLab's modeling_intern_vit.py, lines 210-244.
    """
    check.heads(OP, q=q, k=k, v=v)
    given = {"q_weight": q_weight, "k_weight": k_weight, "rstd_q": rstd_q, "rstd_k": rstd_k}
    absent = [name for name, t in given.items() if t is None]
    if 0 < len(absent) < 4:
        raise ValueError(f"{OP}: q_weight, k_weight, rstd_q and rstd_k go together, got None for {', '.join(absent)}")
    name = resolve(OP, q, backend, q.shape[-1], folded=not absent)
    if not absent:
        check.qk_weights(OP, q, q_weight=q_weight, k_weight=k_weight)
        check.token_statistics(OP, q, rstd_q=rstd_q, rstd_k=rstd_k)
    q, k, v = autocast(q, k, v)  # type: ignore[assignment]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ATTENTION(q, k, v, scale, q_weight, k_weight, rstd_q, rstd_k, name)[0]
