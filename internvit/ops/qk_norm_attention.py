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

from internvit.ops.attention import (
    Heads,
    QKNorm,
    SavedAttention,
    attention_flops,
    default_scale,
    fake_out_and_lse,
)
from internvit.ops.attention import formula as attention_formula
from internvit.ops.attention import portable as portable_attention
from internvit.ops.backends.registry import BACKENDS, has_implementation, implementation
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import OPS, define, define_backward, empty_grad
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Inputs, OpSpec, multiplies, register_spec
from internvit.ops.qk_norm import formula as qk_norm_formula

OP = "qk_norm_attention"
PACKED = f"{OP}_qkvpacked"


def _folds(backend: str, rounding: str) -> bool:
    return rounding == "fused" and BACKENDS[backend].folds_qk_norm


def _run_qk_norm(op: str, q: Tensor, backend: str, *args: Any) -> Any:
    """`op`, qk_norm or its backward, on `backend`; by `auto` where it has none of its own, as sdpa and flash."""
    if has_implementation(op, backend):
        return implementation(op, backend)(*args)
    return OPS[op].run_or_fall_back(OPS[op].run, (*args, resolve("qk_norm", q, "auto")))


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
        return (*attention(q, k, v, scale, None), empty_grad(q), empty_grad(q))
    if _folds(backend, rounding):
        rstd_q, rstd_k = implementation("qk_norm_stats", backend)(q, k, eps)
        return (*attention(q, k, v, scale, QKNorm(q_weight, k_weight, rstd_q, rstd_k)), rstd_q, rstd_k)
    normed = _run_qk_norm("qk_norm", q, backend, q, k, q_weight, k_weight, eps, rounding)
    q_normed, k_normed, rstd_q, rstd_k = normed
    return (*attention(q_normed, k_normed, v, scale, None), rstd_q, rstd_k)


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
        backward(grad_out, SavedAttention(q, k, v, out, lse, scale, None), grads)
        return empty_grad(q), empty_grad(q)
    if _folds(backend, rounding):
        qk_norm = QKNorm(q_weight, k_weight, rstd_q, rstd_k)
        folded = backward(grad_out, SavedAttention(q, k, v, out, lse, scale, qk_norm), grads)
        implementation("qk_norm_stats_backward", backend)(
            folded.row_dot_q.sum(1) / rstd_q, folded.row_dot_k.sum(1) / rstd_k, q, k, rstd_q, rstd_k, *grads[:2]
        )
        return folded.q_weight, folded.k_weight
    q_normed, k_normed, _, _ = _run_qk_norm("qk_norm", q, backend, q, k, q_weight, k_weight, eps, rounding)
    normed_grads = torch.empty_like(q_normed), torch.empty_like(k_normed)
    backward(grad_out, SavedAttention(q_normed, k_normed, v, out, lse, scale, None), (*normed_grads, grads[2]))
    normed = q, k, q_weight, k_weight, rstd_q, rstd_k, (True,) * 4
    grads_of_norm = _run_qk_norm("qk_norm_backward", q, backend, *normed_grads, *normed)
    grad_q, grad_k, grad_q_weight, grad_k_weight = grads_of_norm
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


def _fake_forward(q: Tensor, q_weight: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    statistics = (0,) if q_weight is None else q.shape[:2]
    dtype = torch.float32 if q_weight is None else accumulate_dtype(q)
    return (*fake_out_and_lse(q, backend), *(q.new_empty(statistics, dtype=dtype) for _ in range(2)))


def _validate(
    op: str,
    heads: dict[str, Tensor],
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    scale: float,
    rounding: str,
) -> None:
    check.heads(op, **heads)
    check.eps(op, eps)
    check.scale(op, scale)
    check.choice(op, "rounding", rounding, check.ROUNDINGS)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: q_weight and k_weight go together, got None for one of them")
    check.qk_weights(op, next(iter(heads.values())), q_weight=q_weight, k_weight=k_weight)


def _validate_backward(op: str, grad_out: Tensor, qkv: dict[str, Tensor], *rest: Any) -> None:
    q_weight, k_weight, out, lse, rstd_q, rstd_k, eps, scale, rounding, backend = rest
    _validate(op, qkv, q_weight, k_weight, eps, scale, rounding)
    first, q = next(iter(qkv.items()))
    check.like(op, first, q, grad_out=grad_out, out=out)
    check.lse(op, q, lse, backend)
    if q_weight is not None:
        check.token_statistics(op, q, rstd_q=rstd_q, rstd_k=rstd_k)


def _check_packed(op: str, qkv: Tensor) -> dict[str, Tensor]:
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv must have shape [B, N, 3, H, D], got {check.shape_of(qkv)}")
    return dict(zip(("qkv", "k", "v"), _unpack(qkv), strict=True))


def _validate_packed(qkv: Tensor, *rest: Any) -> None:
    _validate(PACKED, _check_packed(PACKED, qkv), *rest)


_REST = "Tensor? q_weight, Tensor? k_weight, float eps, float scale, str rounding)"
_OUTPUTS = " -> (Tensor out, Tensor lse, Tensor rstd_q, Tensor rstd_k)"
_SAVED = (
    "Tensor? q_weight, Tensor? k_weight, Tensor out, Tensor lse, Tensor rstd_q, Tensor rstd_k, float eps, float scale,"
    " str rounding)"
)
_WEIGHT_GRADS = "Tensor grad_q_weight, Tensor grad_k_weight)"

QK_NORM_ATTENTION = define(
    f"{OP}(Tensor q, Tensor k, Tensor v, {_REST}{_OUTPUTS}",
    fake=lambda q, k, v, q_weight, *rest: _fake_forward(q, q_weight, rest[-1]),
    validate=lambda q, k, v, *rest: _validate(OP, {"q": q, "k": k, "v": v}, *rest),
    run=_forward,
    autocast=("q", "k", "v"),
    choose=lambda args, asked: resolve("attention", args[0], asked, args[0].shape[-1], caller=OP),
    flops=lambda q, *_, **__: attention_flops(q, 2),
)
define_backward(
    QK_NORM_ATTENTION,
    f"{OP}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_SAVED}"
    f" -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, {_WEIGHT_GRADS}",
    validate=lambda grad_out, q, k, v, *rest: _validate_backward(
        f"{OP}_backward", grad_out, {"q": q, "k": k, "v": v}, *rest
    ),
    run=_run_backward,
    flops=lambda grad_out, q, *_, **__: attention_flops(q, 5),
)
QK_NORM_ATTENTION_QKVPACKED = define(
    f"{PACKED}(Tensor qkv, {_REST}{_OUTPUTS}",
    fake=lambda qkv, q_weight, *rest: _fake_forward(_unpack(qkv)[0], q_weight, rest[-1]),
    validate=_validate_packed,
    run=lambda qkv, *rest: _forward(*_unpack(qkv), *rest),
    autocast=("qkv",),
    choose=lambda args, asked: resolve("attention", args[0], asked, args[0].shape[-1], caller=PACKED),
    flops=lambda qkv, *_, **__: attention_flops(qkv, 2),
)
define_backward(
    QK_NORM_ATTENTION_QKVPACKED,
    f"{PACKED}_backward(Tensor grad_out, Tensor qkv, {_SAVED} -> (Tensor grad_qkv, {_WEIGHT_GRADS}",
    validate=lambda grad_out, qkv, *rest: _validate_backward(
        f"{PACKED}_backward", grad_out, _check_packed(f"{PACKED}_backward", qkv), *rest
    ),
    run=_run_packed_backward,
    flops=lambda grad_out, qkv, *_, **__: attention_flops(qkv, 5),
)


def qk_norm_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    rounding: str = "fused",
    backend: str | None = None,
) -> Tensor:
    """QK-norm over all heads together, and attention.

    out = softmax(q_hat k_hat^T * scale) v,  q_hat = rms_norm over (H, D) of q, times q_weight;  k_hat alike

    Args:
        q, k, v: [B, N, H, D], one dtype and device, contiguous in D; under autocast cast as for torch's products.
        q_weight, k_weight: [H * D], q's dtype or float32; both None for attention without QK-norm.
        eps: of QK-norm.
        scale: of the scores; 1 / sqrt(D) by default.
        rounding: "fused" keeps q_hat and k_hat in registers; "reference" rounds them as upstream does.
        backend: overrides `internvit.backend`.

    Returns:
        out: [B, N, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: InternAttention in OpenGVLab's modeling_intern_vit.py.
    """
    return QK_NORM_ATTENTION.call((q, k, v, q_weight, k_weight, eps, default_scale(q, scale), rounding), backend)[0]


def qk_norm_attention_qkvpacked(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    rounding: str = "fused",
    backend: str | None = None,
) -> Tensor:
    """`qk_norm_attention` of the packed projection, whose gradient is one packed tensor.

    out = softmax(q_hat k_hat^T * scale) v,  q, k, v = qkv.unbind(2)

    Args:
        qkv: [B, N, 3, H, D], contiguous in D.
        q_weight, k_weight, eps, scale, rounding, backend: as for `qk_norm_attention`.

    Returns:
        out: [B, N, H, D], qkv's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: InternAttention in OpenGVLab's modeling_intern_vit.py; the name is flash-attn's.
    """
    args = (qkv, q_weight, k_weight, eps, default_scale(qkv, scale), rounding)
    return QK_NORM_ATTENTION_QKVPACKED.call(args, backend)[0]


def _formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "fused",
) -> Tensor:
    if q_weight is not None and k_weight is not None:
        q, k = qk_norm_formula(q, k, q_weight, k_weight, eps)
    return attention_formula(q, k, v)


def _portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    scale: float,
) -> Tensor:
    if q_weight is not None and k_weight is not None:
        q, k = qk_norm_formula(q, k, q_weight, k_weight, eps)
    return portable_attention(q, k, v, scale)


def _packed_formula(qkv: Tensor, *args: Any, **named: Any) -> Tensor:
    return _formula(*_unpack(qkv), *args, **named)


def _weights(make: Inputs) -> dict[str, Any]:
    return {"q_weight": make.vector(1.0), "k_weight": make.vector(1.0)}


register_spec(
    OpSpec(
        qk_norm_attention,
        OP,
        _formula,
        {"": lambda make: {**dict(zip("qkv", make.qkv().unbind(2), strict=True)), **_weights(make)}},
        multiplies,
        resolves_as="attention",
        portable=_portable,
    )
)
register_spec(
    OpSpec(
        qk_norm_attention_qkvpacked,
        PACKED,
        _packed_formula,
        {
            "": lambda make: {"qkv": make.qkv(), **_weights(make)},
            "reference": lambda make: {"qkv": make.qkv(), **_weights(make), "rounding": "reference"},
            "no weights": lambda make: {"qkv": make.qkv()},
        },
        multiplies,
        resolves_as="attention",
        portable=lambda qkv, **named: _portable(*_unpack(qkv), **named),
    )
)
