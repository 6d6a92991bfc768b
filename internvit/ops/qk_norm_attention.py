"""QK-norm and attention, from q, k, v as the projection wrote them to the projection's next input.

    out = attention(q_hat, k_hat, v),  q_hat = q * rstd_q * q_weight,  rstd over all heads together;  k alike

rounding="fused": `qk_norm_stats`, then `attention` with the norm inside; q_hat and k_hat never exist in memory.
rounding="reference", or a backend that does not fold: `qk_norm` writes q_hat and k_hat, then plain attention.
Backward keeps q, k, v, out, lse and two numbers per token; a packed [B, N, 3, H, D] input gets one packed gradient.

    grad_q = rstd_q * q_weight * grad_q_hat - rstd_q^2 / C * row_dot_q * q,  row_dot_q = sum over all heads of dS * S
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from internvit.ops.attention import autocast, fake_out_and_lse
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import BACKENDS, implementation, implements, resolve

OP = "qk_norm_attention"
Heads = tuple[Tensor, Tensor, Tensor]


def _folds(backend: str, rounding: str) -> bool:
    return rounding == "fused" and BACKENDS[backend].folds_qk_norm


def _norm_backend(q: Tensor, backend: str) -> str:
    """The backend of `qk_norm` beside an attention backend that has none of its own, as sdpa and flash."""
    return backend if implements("qk_norm", backend) else resolve("qk_norm", q, "auto")


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    scale: float,
    rounding: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    attention = implementation("attention", backend)
    if q_weight is None or k_weight is None:
        out, lse = attention(q, k, v, scale, None, None, None, None)
        return out, lse, empty_grad(q), empty_grad(q)
    if _folds(backend, rounding):
        rstd_q, rstd_k = implementation("qk_norm_stats", backend)(q, k, eps)
        out, lse = attention(q, k, v, scale, q_weight, k_weight, rstd_q, rstd_k)
        return out, lse, rstd_q, rstd_k
    norm = implementation("qk_norm", _norm_backend(q, backend))
    q_normed, k_normed, rstd_q, rstd_k = norm(q, k, q_weight, k_weight, eps, rounding)
    out, lse = attention(q_normed, k_normed, v, scale, None, None, None, None)
    return out, lse, rstd_q, rstd_k


def _backward(
    grad_out: Tensor,
    qkv: Heads,
    grads: Heads,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    eps: float,
    scale: float,
    rounding: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Fills `grads` (any strides); returns the gradients of the weights."""
    q, k, v = qkv
    backward = implementation("attention_backward", backend)
    if q_weight is None or k_weight is None:
        backward(grad_out, q, k, v, out, lse, scale, None, None, None, None, *grads)
        return empty_grad(q), empty_grad(q)
    if _folds(backend, rounding):
        grad_q_weight, grad_k_weight, row_dot_q, row_dot_k = backward(
            grad_out, q, k, v, out, lse, scale, q_weight, k_weight, rstd_q, rstd_k, *grads
        )
        implementation("qk_norm_stats_backward", backend)(
            row_dot_q.sum(1) / rstd_q, row_dot_k.sum(1) / rstd_k, q, k, rstd_q, rstd_k, *grads[:2]
        )
        return grad_q_weight, grad_k_weight
    norm_backend = _norm_backend(q, backend)
    q_normed, k_normed, _, _ = implementation("qk_norm", norm_backend)(q, k, q_weight, k_weight, eps, rounding)
    normed_grads = torch.empty_like(q_normed), torch.empty_like(k_normed)
    backward(grad_out, q_normed, k_normed, v, out, lse, scale, None, None, None, None, *normed_grads, grads[2])
    grad_q, grad_k, grad_q_weight, grad_k_weight = implementation("qk_norm_backward", norm_backend)(
        *normed_grads, q, k, q_weight, k_weight, rstd_q, rstd_k, (True,) * 4
    )
    grads[0].copy_(grad_q)
    grads[1].copy_(grad_k)
    return grad_q_weight, grad_k_weight


def _unpack(qkv: Tensor) -> Heads:
    q, k, v = qkv.unbind(2)
    return q, k, v


def _run_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return (*grads, *_backward(grad_out, (q, k, v), grads, *rest))


def _run_packed_backward(grad_out: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_qkv = qkv.new_empty(qkv.shape)
    return (grad_qkv, *_backward(grad_out, _unpack(qkv), _unpack(grad_qkv), *rest))


def _function(inputs: int, op: str) -> type[Function]:
    """The autograd Function over q, k, v (`inputs` = 3) or packed qkv (1): the same but for the count."""

    class QKNormAttentionFunction(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            *heads, q_weight, k_weight, eps, scale, rounding, backend = args
            outputs = below_autograd(getattr(torch.ops.internvit, op).default, *args)
            ctx.save_for_backward(*heads, q_weight, k_weight, *outputs)
            ctx.settings = eps, scale, rounding, backend
            ctx.mark_non_differentiable(*outputs[1:])
            ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            if grad_out is None:
                return (None,) * (inputs + 6)
            backward_op = getattr(torch.ops.internvit, f"{op}_backward").default
            grads = backward_op(grad_out, *ctx.saved_tensors, *ctx.settings)
            return (*wanted(grads, ctx.needs_input_grad[: inputs + 2]), None, None, None, None)

    return QKNormAttentionFunction


def _fake_forward(q: Tensor, q_weight: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    statistics = (0,) if q_weight is None else q.shape[:2]
    dtype = torch.float32 if q_weight is None else accumulate_dtype(q)
    return (*fake_out_and_lse(q, backend), *(q.new_empty(statistics, dtype=dtype) for _ in range(2)))


def _fake_weight_grads(q: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(empty_grad(q) if w is None else w.new_empty(w.shape) for w in weights)


_SETTINGS = "float eps, float scale, str rounding, str backend"
_FORWARD_REST = (
    f"Tensor? q_weight, Tensor? k_weight, {_SETTINGS}) -> (Tensor out, Tensor lse, Tensor rstd_q, Tensor rstd_k)"
)
_BACKWARD_REST = (
    f"Tensor? q_weight, Tensor? k_weight, Tensor out, Tensor lse, Tensor rstd_q, Tensor rstd_k, {_SETTINGS})"
)

QK_NORM_ATTENTION = define(
    f"{OP}(Tensor q, Tensor k, Tensor v, {_FORWARD_REST}",
    fake=lambda q, k, v, q_weight, *rest: _fake_forward(q, q_weight, rest[-1]),
    run=_forward,
    autograd=_function(3, OP),
)
QK_NORM_ATTENTION_BACKWARD = define(
    f"{OP}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_BACKWARD_REST}"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_weight, Tensor grad_k_weight)",
    fake=lambda grad_out, q, k, v, q_weight, k_weight, *rest: (
        *(t.new_empty(t.shape) for t in (q, k, v)),
        *_fake_weight_grads(q, q_weight, k_weight),
    ),
    run=_run_backward,
)
QK_NORM_ATTENTION_PACKED = define(
    f"{OP}_packed(Tensor qkv, {_FORWARD_REST}",
    fake=lambda qkv, q_weight, *rest: _fake_forward(_unpack(qkv)[0], q_weight, rest[-1]),
    run=lambda qkv, *rest: _forward(*_unpack(qkv), *rest),
    autograd=_function(1, f"{OP}_packed"),
)
QK_NORM_ATTENTION_PACKED_BACKWARD = define(
    f"{OP}_packed_backward(Tensor grad_out, Tensor qkv, {_BACKWARD_REST}"
    " -> (Tensor grad_qkv, Tensor grad_q_weight, Tensor grad_k_weight)",
    fake=lambda grad_out, qkv, q_weight, k_weight, *rest: (
        qkv.new_empty(qkv.shape),
        *_fake_weight_grads(qkv, q_weight, k_weight),
    ),
    run=_run_packed_backward,
)


def qk_norm_attention(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    scale: float | None = None,
    rounding: str = "fused",
    backend: str | None = None,
) -> Tensor:
    """QK-norm over all heads together, and attention.

    out = softmax(q_hat k_hat^T * scale) v,  q_hat = rms_norm over (H, D) of q, times q_weight;  k_hat alike

    Args:
        q: [B, N, H, D]; or the packed projection [B, N, 3, H, D], then k and v are None and the gradient is packed.
        k, v: [B, N, H, D], q's dtype and device, contiguous in D.
        q_weight, k_weight: [H * D], q's dtype or float32; both None for attention without QK-norm.
        eps: of QK-norm.
        scale: of the scores; 1 / sqrt(D) by default.
        rounding: "fused" keeps q_hat and k_hat in registers; "reference" rounds them as upstream does.
        backend: overrides `internvit.backend`.

    Returns:
        out: [B, N, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: InternAttention in OpenGVLab's modeling_intern_vit.py, lines 202-244.
    """
    packed = k is None and v is None
    if packed:
        if q.dim() != 5 or q.shape[2] != 3:
            raise ValueError(
                f"{OP}: q alone must be the packed [B, N, 3, H, D], got {check.shape_of(q)}; or give q, k and v"
            )
        heads = _unpack(q)
    elif k is None or v is None:
        raise ValueError(f"{OP}: k and v go together, got None for {'k' if k is None else 'v'}")
    else:
        heads = (q, k, v)
    check.heads(OP, **dict(zip("qkv", heads, strict=True)))
    check.eps(OP, eps)
    check.choice(OP, "rounding", rounding, check.ROUNDINGS)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{OP}: q_weight and k_weight go together, got None for one of them")
    check.qk_weights(OP, heads[0], q_weight=q_weight, k_weight=k_weight)
    name = resolve("attention", q, backend, q.shape[-1], caller=OP)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    inputs = autocast(q) if packed else autocast(q, k, v)
    op = QK_NORM_ATTENTION_PACKED if packed else QK_NORM_ATTENTION
    return op(*inputs, q_weight, k_weight, eps, scale, rounding, name)[0]
