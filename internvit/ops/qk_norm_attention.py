"""QK-norm and attention, from q, k, v as the projection wrote them to the projection's next input.

    out = attention(q_hat, k_hat, v),  q_hat = q * rstd_q * q_weight,  rstd over all heads together;  k alike

rounding="fused": `qk_norm_stats`, then `attention` with the norm inside; q_hat and k_hat never exist in memory.
rounding="reference", or a backend that does not fold: `qk_norm` writes q_hat and k_hat, then plain attention.
Backward keeps q, k, v, out, lse and two numbers per token; a packed [B, N, 3, H, D] input gets one packed gradient.
With cu_seqlens, q, k and v are [total, H, D] or the packed [total, 3, H, D]; see `internvit.ops.attention`.

    grad_q = rstd_q * q_weight * grad_q_hat - rstd_q^2 / C * row_dot_q * q,  row_dot_q = sum over all heads of dS * S
"""

from typing import Any

import torch
from torch import Tensor

from internvit.ops.attention import attention_flops, default_scale, fake_out_and_lse, heads_example, run_attention
from internvit.ops.backends.registry import BACKENDS, has_implementation, implementation
from internvit.ops.core import validation as check
from internvit.ops.core.attention_math import Heads, QKNorm, SavedAttention
from internvit.ops.core.attention_math import formula as attention_formula
from internvit.ops.core.attention_math import portable as portable_attention
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.padding import Padding, check_key_padding_mask, without_padding
from internvit.ops.core.registration import OPS, define, define_backward, empty_grad
from internvit.ops.core.select import resolve
from internvit.ops.core.sequences import Sequences, check_values, default_max_seqlen, pack
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
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_values(OP, cu_seqlens, max_seqlen, q.shape[0])
    sequences = pack(cu_seqlens, max_seqlen, q.shape[0])
    if q_weight is None or k_weight is None:
        return (*run_attention(backend, q, k, v, scale, None, sequences), empty_grad(q), empty_grad(q))
    batched_q, batched_k = _as_image(q), _as_image(k)
    if _folds(backend, rounding):
        rstd_q, rstd_k = implementation("qk_norm_stats", backend)(batched_q, batched_k, eps)
        if sequences is not None:
            rstd_q, rstd_k = rstd_q.squeeze(0), rstd_k.squeeze(0)
        inside = QKNorm(q_weight, k_weight, rstd_q, rstd_k)
        return (*run_attention(backend, q, k, v, scale, inside, sequences), rstd_q, rstd_k)
    normed = _run_qk_norm("qk_norm", q, backend, batched_q, batched_k, q_weight, k_weight, eps, rounding)
    q_normed, k_normed = (t.view(q.shape) for t in normed[:2])
    rstd_q, rstd_k = (t.view(q.shape[:-2]) for t in normed[2:])
    return (*run_attention(backend, q_normed, k_normed, v, scale, None, sequences), rstd_q, rstd_k)


def _as_image(x: Tensor) -> Tensor:
    """Heads or statistics of packed sequences as those of one image: QK-norm is over each token alone."""
    return x if x.dim() in (2, 4) else x[None]


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
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Fills `grads` (any strides); returns the gradients of the weights."""
    check_values(f"{OP}_backward", cu_seqlens, max_seqlen, grad_out.shape[0])
    (q, k, v), sequences = qkv, pack(cu_seqlens, max_seqlen, grad_out.shape[0])
    backward = implementation("attention_backward", backend)
    if q_weight is None or k_weight is None:
        backward(grad_out, SavedAttention(q, k, v, out, lse, scale, None, sequences), grads)
        return empty_grad(q), empty_grad(q)
    rstd_of = [_as_image(t) for t in (rstd_q, rstd_k)]
    heads_of = [_as_image(t) for t in (q, k)]
    if _folds(backend, rounding):
        qk_norm = QKNorm(q_weight, k_weight, rstd_q, rstd_k)
        folded = backward(grad_out, SavedAttention(q, k, v, out, lse, scale, qk_norm, sequences), grads)
        slopes = folded.row_dot_q.sum(-2) / rstd_q, folded.row_dot_k.sum(-2) / rstd_k
        written = [_as_image(t) for t in (*slopes, *grads[:2])]
        implementation("qk_norm_stats_backward", backend)(*written[:2], *heads_of, *rstd_of, *written[2:])
        return folded.q_weight, folded.k_weight
    normed = _run_qk_norm("qk_norm", q, backend, *heads_of, q_weight, k_weight, eps, rounding)
    q_normed, k_normed = (t.view(q.shape) for t in normed[:2])
    normed_grads = torch.empty_like(q_normed), torch.empty_like(k_normed)
    saved = SavedAttention(q_normed, k_normed, v, out, lse, scale, None, sequences)
    backward(grad_out, saved, (*normed_grads, grads[2]))
    inputs = *heads_of, q_weight, k_weight, *rstd_of, (True,) * 4
    grads_of_norm = _run_qk_norm("qk_norm_backward", q, backend, *map(_as_image, normed_grads), *inputs)
    grad_q, grad_k, grad_q_weight, grad_k_weight = grads_of_norm
    grads[0].copy_(grad_q.view(q.shape))
    grads[1].copy_(grad_k.view(k.shape))
    return grad_q_weight, grad_k_weight


def _unpack(qkv: Tensor) -> Heads:
    q, k, v = qkv.unbind(-3)
    return q, k, v


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)  # half the host time of new_empty


def _run_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = _contiguous_like(q), _contiguous_like(k), _contiguous_like(v)
    return (*grads, *_backward(grad_out, (q, k, v), grads, *rest))


def _run_packed_backward(grad_out: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_qkv = qkv.new_empty(qkv.shape)
    return (grad_qkv, *_backward(grad_out, _unpack(qkv), _unpack(grad_qkv), *rest))


def _fake_forward(q: Tensor, q_weight: Tensor | None, backend: str) -> tuple[Tensor, ...]:
    statistics = (0,) if q_weight is None else q.shape[:-2]
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
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> None:
    first, q = next(iter(heads.items()))
    check.sequences(op, first, q, cu_seqlens, max_seqlen)
    check.heads(op, varlen=cu_seqlens is not None, **heads)
    check.eps(op, eps)
    check.scale(op, scale)
    check.choice(op, "rounding", rounding, check.ROUNDINGS)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: q_weight and k_weight go together, got None for one of them")
    check.qk_weights(op, q, q_weight=q_weight, k_weight=k_weight)


def _validate_backward(op: str, grad_out: Tensor, qkv: dict[str, Tensor], *rest: Any) -> None:
    q_weight, k_weight, out, lse, rstd_q, rstd_k, *settings, backend = rest
    _validate(op, qkv, q_weight, k_weight, *settings)
    first, q = next(iter(qkv.items()))
    check.like(op, first, q, grad_out=grad_out, out=out)
    check.lse(op, q, lse, backend)
    if q_weight is not None:
        check.token_statistics(op, q, rstd_q=rstd_q, rstd_k=rstd_k)


def _check_packed(op: str, qkv: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> dict[str, Tensor]:
    check.sequences(op, "qkv", qkv, cu_seqlens, max_seqlen)
    if qkv.dim() != (5 if cu_seqlens is None else 4) or qkv.shape[-3] != 3:
        layout = "[B, N, 3, H, D]" if cu_seqlens is None else "[total, 3, H, D] beside cu_seqlens"
        raise ValueError(f"{op}: qkv must have shape {layout}, got {check.shape_of(qkv)}")
    return dict(zip(("qkv", "k", "v"), _unpack(qkv), strict=True))


def _validate_packed(qkv: Tensor, *rest: Any) -> None:
    _validate(PACKED, _check_packed(PACKED, qkv, *rest[-2:]), *rest)


def _resolve(args: tuple[Any, ...], asked: str | None, caller: str) -> str:
    x, cu_seqlens = args[0], args[-2]
    return resolve("attention", x, asked, x.shape[-1], caller=caller, varlen=cu_seqlens is not None)


_SEQUENCES = "Tensor? cu_seqlens, SymInt? max_seqlen)"
_REST = f"Tensor? q_weight, Tensor? k_weight, float eps, float scale, str rounding, {_SEQUENCES}"
_OUTPUTS = " -> (Tensor out, Tensor lse, Tensor rstd_q, Tensor rstd_k)"
_SAVED = (
    "Tensor? q_weight, Tensor? k_weight, Tensor out, Tensor lse, Tensor rstd_q, Tensor rstd_k, float eps, float scale,"
    f" str rounding, {_SEQUENCES}"
)
_WEIGHT_GRADS = "Tensor grad_q_weight, Tensor grad_k_weight)"

QK_NORM_ATTENTION = define(
    f"{OP}(Tensor q, Tensor k, Tensor v, {_REST}{_OUTPUTS}",
    fake=lambda q, k, v, q_weight, *rest: _fake_forward(q, q_weight, rest[-1]),
    validate=lambda q, k, v, *rest: _validate(OP, {"q": q, "k": k, "v": v}, *rest),
    run=_forward,
    autocast=("q", "k", "v"),
    choose=lambda args, asked: _resolve(args, asked, OP),
    flops=lambda q, *rest, **__: attention_flops(q, 2, rest[-2]),
)
define_backward(
    QK_NORM_ATTENTION,
    f"{OP}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, {_SAVED}"
    f" -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, {_WEIGHT_GRADS}",
    validate=lambda grad_out, q, k, v, *rest: _validate_backward(
        f"{OP}_backward", grad_out, {"q": q, "k": k, "v": v}, *rest
    ),
    run=_run_backward,
    flops=lambda grad_out, q, *rest, **__: attention_flops(q, 5, rest[-2]),
)
QK_NORM_ATTENTION_QKVPACKED = define(
    f"{PACKED}(Tensor qkv, {_REST}{_OUTPUTS}",
    fake=lambda qkv, q_weight, *rest: _fake_forward(_unpack(qkv)[0], q_weight, rest[-1]),
    validate=_validate_packed,
    run=lambda qkv, *rest: _forward(*_unpack(qkv), *rest),
    autocast=("qkv",),
    choose=lambda args, asked: _resolve(args, asked, PACKED),
    flops=lambda qkv, *rest, **__: attention_flops(qkv, 2, rest[-2]),
)
define_backward(
    QK_NORM_ATTENTION_QKVPACKED,
    f"{PACKED}_backward(Tensor grad_out, Tensor qkv, {_SAVED} -> (Tensor grad_qkv, {_WEIGHT_GRADS}",
    validate=lambda grad_out, qkv, *rest: _validate_backward(
        f"{PACKED}_backward", grad_out, _check_packed(f"{PACKED}_backward", qkv, *rest[-3:-1]), *rest
    ),
    run=_run_packed_backward,
    flops=lambda grad_out, qkv, *rest, **__: attention_flops(qkv, 5, rest[-2]),
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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    key_padding_mask: Tensor | None = None,
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
        cu_seqlens, max_seqlen: packed sequences, of q, k, v [total, H, D]; as for `attention`.
        key_padding_mask: bool [B, N], True for tokens that are padding, as in torch.nn.MultiheadAttention: as keys they
            are left out, as queries they have out 0, and their gradients are 0; an image may be all padding. Not beside
            cu_seqlens.
        backend: overrides `internvit.backend`.

    Returns:
        out: [B, N, H, D] or [total, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: InternAttention in OpenGVLab's modeling_intern_vit.py.
    """
    known_scale: Any = default_scale(q, scale)  # but where q is no tensor, which validation says
    settings = q_weight, k_weight, eps, known_scale, rounding
    if key_padding_mask is None:
        args = (q, k, v, *settings, cu_seqlens, default_max_seqlen(q, cu_seqlens, max_seqlen))
        return QK_NORM_ATTENTION.call(args, backend)[0]
    check_key_padding_mask(OP, key_padding_mask, q, k, cu_seqlens)
    _validate(OP, {"q": q, "k": k, "v": v}, *settings, cu_seqlens, max_seqlen)
    padding = Padding.of(key_padding_mask)
    args = (*padding.pack_heads(q, k, v), *settings, padding.ends, q.shape[1])
    return padding.unpack(QK_NORM_ATTENTION.call(args, backend)[0])


def qk_norm_attention_with_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    rounding: str,
    scale: float | None,
    sequences: Sequences | None,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """The output of `qk_norm_attention`, lse, and with QK-norm inside attention rstd_q and rstd_k.

    lse is None where the backend returns none; rstd where q_hat and k_hat were written, whose scores lse is then of.
    """
    packed = (None, None) if sequences is None else (sequences.cu_seqlens, sequences.max_seqlen)
    args = (q, k, v, q_weight, k_weight, eps, default_scale(q, scale), rounding, *packed)
    out, lse, rstd_q, rstd_k = QK_NORM_ATTENTION.call(args, None)
    if lse is None or lse.shape != check.lse_shape(q):  # None in graphs for other programs
        lse = None
    if rstd_q is None or q_weight is None or not _folds(_resolve(args, None, OP), rounding):
        return out, lse, None
    return out, lse, (rstd_q, rstd_k)


def qk_norm_attention_qkvpacked(
    qkv: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    scale: float | None = None,
    rounding: str = "fused",
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """`qk_norm_attention` of the packed projection, whose gradient is one packed tensor.

    out = softmax(q_hat k_hat^T * scale) v,  q, k, v = qkv.unbind(2)

    Args:
        qkv: [B, N, 3, H, D], or [total, 3, H, D] with cu_seqlens, contiguous in D.
        q_weight, k_weight, eps, scale, rounding, cu_seqlens, max_seqlen, backend: as for `qk_norm_attention`.

    Returns:
        out: [B, N, H, D] or [total, H, D], qkv's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: InternAttention in OpenGVLab's modeling_intern_vit.py; the name is flash-attn's.
    """
    max_seqlen = default_max_seqlen(qkv, cu_seqlens, max_seqlen)
    args = (qkv, q_weight, k_weight, eps, default_scale(qkv, scale), rounding, cu_seqlens, max_seqlen)
    return QK_NORM_ATTENTION_QKVPACKED.call(args, backend)[0]


def _formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    rounding: str = "fused",
    key_padding_mask: Tensor | None = None,
    **packed: Any,
) -> Tensor:
    normed = _norm(q, k, q_weight, k_weight, eps)
    return without_padding(attention_formula(*normed, v, key_padding_mask=key_padding_mask, **packed), key_padding_mask)


def _norm(q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    if q_weight is None or k_weight is None:
        return q, k
    normed = qk_norm_formula(_as_image(q), _as_image(k), q_weight, k_weight, eps)
    return normed[0].view(q.shape), normed[1].view(k.shape)


def _portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    scale: float,
    **packed: Any,
) -> Tensor:
    return portable_attention(*_norm(q, k, q_weight, k_weight, eps), v, scale, **packed)


def _weights(make: Inputs) -> dict[str, Any]:
    return {"q_weight": make.vector(1.0), "k_weight": make.vector(1.0)}


register_spec(
    OpSpec(
        qk_norm_attention,
        OP,
        _formula,
        {
            "": lambda make: {**heads_example(make.qkv()), **_weights(make)},
            "cu_seqlens": lambda make: {**heads_example(make.packed_qkv()), **_weights(make), **make.sequences()},
            "key_padding_mask": lambda make: {**heads_example(make.qkv()), **_weights(make), **make.padding()},
        },
        multiplies,
        resolves_as="attention",
        portable=_portable,
    )
)
register_spec(
    OpSpec(
        qk_norm_attention_qkvpacked,
        PACKED,
        lambda qkv, **named: _formula(*_unpack(qkv), **named),
        {
            "": lambda make: {"qkv": make.qkv(), **_weights(make)},
            "reference": lambda make: {"qkv": make.qkv(), **_weights(make), "rounding": "reference"},
            "no weights": lambda make: {"qkv": make.qkv()},
            "cu_seqlens": lambda make: {"qkv": make.packed_qkv(), **_weights(make), **make.sequences()},
        },
        multiplies,
        resolves_as="attention",
        portable=lambda qkv, **named: _portable(*_unpack(qkv), **named),
    )
)
