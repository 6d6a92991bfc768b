"""Attention over one image's tokens, with QK-norm inside when its weights and statistics are given.

    out[b, :, h] = softmax(q_hat k_hat^T * scale) v
    q_hat = q * rstd_q[b, n] * q_weight[h * D + d],  k_hat alike;  q_hat = q, k_hat = k without weights

q, k, v [B, N, H, D], contiguous in D, any other strides; q_weight, k_weight [H * D]; rstd_q, rstd_k [B, N] float32;
out [B, N, H, D] contiguous, so that out.flatten(2) is the projection's input; lse [B, H, N] float32, the natural
logarithm of each softmax row's sum (empty where a backend does not expose it). rstd is an input like any other: it has
a gradient, and `qk_norm_attention` closes the chain.

A backend implements `attention(q, k, v, scale, qk_norm) -> (out, lse)`, where `qk_norm` is a `QKNorm` or None, and
`attention_backward(grad_out, saved, grads)`, which fills `grads` and returns a `QKNormGrads`, None without QK-norm.
"""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from internvit.ops.backends.registry import BACKENDS, implementation, implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import define, define_backward, empty_grad
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Inputs, OpSpec, multiplies, register_spec

OP = "attention"
Heads = tuple[Tensor, Tensor, Tensor]


class QKNorm(NamedTuple):
    """QK-norm inside attention: weights [H * D] and statistics [B, N]."""

    q_weight: Tensor
    k_weight: Tensor
    rstd_q: Tensor
    rstd_k: Tensor


class SavedAttention(NamedTuple):
    """What attention keeps for backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    scale: float
    qk_norm: QKNorm | None


class QKNormGrads(NamedTuple):
    """Gradients of the weights [H * D], and of the statistics' chain: row_dot_q[b, h, n] = sum_d grad_q_hat * q_hat."""

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


@implements(OP, "reference")
def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None) -> tuple[Tensor, Tensor]:
    q_hat, k_hat = _normed(q, k, qk_norm)
    scores = q_hat @ k_hat.transpose(-1, -2) * scale
    # Not exp(scores - lse): the rounding of a large lse would be a factor of every probability.
    out = scores.softmax(-1) @ heads_first(v)
    return out.transpose(1, 2).to(q.dtype).contiguous(), scores.logsumexp(-1)


@implements(f"{OP}_backward", "reference")
def attention_backward_reference(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> QKNormGrads | None:
    """Fills grads, rstd held fixed.

    row_dot_q[b, h, n] = sum_d grad_q_hat * q_hat = sum_j dS_ij S_ij, and over i for k: what the gradient of rstd needs.
    """
    q, k, v, out, _, scale, qk_norm = saved
    q_hat, k_hat = _normed(q, k, qk_norm)
    values, grad = heads_first(v), heads_first(grad_out)
    probabilities = (q_hat @ k_hat.transpose(-1, -2) * scale).softmax(-1)
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


def _qk_norm(
    q_weight: Tensor | None, k_weight: Tensor | None, rstd_q: Tensor | None, rstd_k: Tensor | None
) -> QKNorm | None:
    if q_weight is None or k_weight is None or rstd_q is None or rstd_k is None:
        return None
    return QKNorm(q_weight, k_weight, rstd_q, rstd_k)


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
    *qk_norm, backend = rest
    return implementation(OP, backend)(q, k, v, scale, _qk_norm(*qk_norm))


def _run_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *rest: Any
) -> tuple[Tensor, ...]:
    *inside, backend = rest
    qk_norm = _qk_norm(*inside)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    saved = SavedAttention(q, k, v, out, lse, scale, qk_norm)
    qk_norm_grads = implementation(f"{OP}_backward", backend)(grad_out, saved, grads)
    if qk_norm is None:
        return (*grads, *(empty_grad(q) for _ in range(4)))
    q_weight, k_weight, row_dot_q, row_dot_k = qk_norm_grads
    return (*grads, q_weight, k_weight, row_dot_q.sum(1) / qk_norm.rstd_q, row_dot_k.sum(1) / qk_norm.rstd_k)


def fake_out_and_lse(q: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    lse_shape = (batch, heads, tokens) if BACKENDS[backend].exposes_lse_on(q.device.type) else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=accumulate_dtype(q))


def attention_flops(q: tuple[int, ...], products: int) -> int:
    """FLOPs of `products` matrix products over all pairs of tokens; q [B, N, H, D] or the packed [B, N, 3, H, D]."""
    batch, tokens, heads, head_dim = *q[:2], *q[-2:]
    return products * 2 * batch * heads * tokens * tokens * head_dim


def _validate(q: Tensor, k: Tensor, v: Tensor, scale: float, *qk_norm: Tensor | None) -> None:
    check.heads(OP, q=q, k=k, v=v)
    check.scale(OP, scale)
    _validate_qk_norm(OP, q, *qk_norm)


def _validate_qk_norm(op: str, q: Tensor, *qk_norm: Tensor | None) -> None:
    given = dict(zip(QKNorm._fields, qk_norm, strict=True))
    absent = [name for name, t in given.items() if t is None]
    if 0 < len(absent) < 4:
        raise ValueError(f"{op}: {', '.join(given)} go together, got None for {', '.join(absent)}")
    if not absent:
        check.qk_weights(op, q, q_weight=given["q_weight"], k_weight=given["k_weight"])
        check.token_statistics(op, q, rstd_q=given["rstd_q"], rstd_k=given["rstd_k"])


def _validate_backward(*args: Any) -> None:
    grad_out, q, k, v, out, lse, scale, *qk_norm, backend = args
    op = f"{OP}_backward"
    check.heads(op, q=q, k=k, v=v)
    check.scale(op, scale)
    check.like(op, "q", q, grad_out=grad_out, out=out)
    check.lse(op, q, lse, backend)
    _validate_qk_norm(op, q, *qk_norm)


def _raw_fake_backward(*args: Any) -> tuple[Tensor, ...]:
    *saved, grad_q, grad_k, grad_v = args
    _validate_backward(*saved, "cpu")
    q, q_weight, k_weight = saved[1], saved[7], saved[8]
    check.written(f"{OP}_backward", "q", q, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    if q_weight is None:
        return tuple(empty_grad(q) for _ in range(4))
    row_dots = (q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q)) for _ in range(2))
    return (q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape), *row_dots)


ATTENTION = define(
    f"{OP}(Tensor q, Tensor k, Tensor v, float scale, Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q,"
    " Tensor? rstd_k) -> (Tensor out, Tensor lse)",
    fake=lambda q, *rest: fake_out_and_lse(q, rest[-1]),
    validate=_validate,
    run=_run,
    autocast=("q", "k", "v"),
    choose=lambda args, asked: resolve(OP, args[0], asked, args[0].shape[-1], folded=args[4] is not None),
    flops=lambda q, *_, **__: attention_flops(q, 2),  # q k^T and p v
    compiled=("cpu",),
)
define_backward(
    ATTENTION,
    f"{OP}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q, Tensor? rstd_k)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_weight, Tensor grad_k_weight,"
    " Tensor grad_rstd_q, Tensor grad_rstd_k)",
    validate=_validate_backward,
    run=_run_backward,
    flops=lambda grad_out, q, *_, **__: attention_flops(q, 5),  # dv, dp, dq, dk, and the scores again
    raw_schema=f"{OP}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q, Tensor? rstd_k, Tensor(a!) grad_q, Tensor(b!) grad_k,"
    " Tensor(c!) grad_v) -> (Tensor grad_q_weight, Tensor grad_k_weight, Tensor row_dot_q, Tensor row_dot_k)",
    raw_fake=_raw_fake_backward,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    rstd_q: Tensor | None = None,
    rstd_k: Tensor | None = None,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention without mask or dropout; with weights and statistics, QK-norm happens inside.

    out = softmax(q_hat k_hat^T * scale) v,  q_hat = q * rstd_q * q_weight,  k_hat = k * rstd_k * k_weight

    Args:
        q, k, v: [B, N, H, D], one dtype and device, contiguous in D (views of a packed [B, N, 3, H, D] need no copy);
            under autocast 16- and 32-bit floats are cast as for torch's products.
        q_weight, k_weight: [H * D], q's dtype or float32, QK-norm's weights over all heads.
        rstd_q, rstd_k: [B, N], the statistics of QK-norm. All four are given, or none.
        scale: of the scores; 1 / sqrt(D) by default.
        backend: overrides `internvit.backend`; "sdpa" and "flash" exist for attention alone and take no weights.

    Returns:
        out: [B, N, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: Vaswani et al. 2017; InternAttention in OpenGVLab's modeling_intern_vit.py.
    """
    args = (q, k, v, default_scale(q, scale), q_weight, k_weight, rstd_q, rstd_k)
    return ATTENTION.call(args, backend)[0]


def default_scale(q: Any, scale: float | None) -> float | None:
    """1 / sqrt(D) by default; None where q is no tensor, which validation says."""
    if scale is not None or not isinstance(q, Tensor) or q.dim() == 0 or q.shape[-1] == 0:
        return scale
    return q.shape[-1] ** -0.5


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of [B, N, H, D] in plain PyTorch."""
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
) -> Tensor:
    """Attention of [B, N, H, D] by PyTorch's function."""
    q_hat, k_hat = _normed(q, k, _qk_norm(q_weight, k_weight, rstd_q, rstd_k))
    out = F.scaled_dot_product_attention(q_hat.to(q.dtype), k_hat.to(q.dtype), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def _folded_formula(q: Tensor, k: Tensor, v: Tensor, *qk_norm: Tensor, **named: Tensor) -> Tensor:
    weights = dict(zip(QKNorm._fields, qk_norm, strict=False)) | named
    if not weights:
        return formula(q, k, v)
    q_hat, k_hat = (
        x * weights[f"rstd_{n}"].to(x.dtype)[:, :, None, None] * weights[f"{n}_weight"].view(x.shape[2:])
        for n, x in (("q", q), ("k", k))
    )
    return formula(q_hat, k_hat, v)


def _folded_example(make: Inputs) -> dict[str, Any]:
    q, k, v = make.qkv().unbind(2)
    rstd = {f"rstd_{n}": (x.float().square().mean((-2, -1)) + 1e-6).rsqrt() for n, x in (("q", q), ("k", k))}
    rstd = {n: t.to(accumulate_dtype(q)) for n, t in rstd.items()}
    return {"q": q, "k": k, "v": v, "q_weight": make.vector(1.0), "k_weight": make.vector(1.0), **rstd}


register_spec(
    OpSpec(
        attention,
        OP,
        _folded_formula,
        {"": lambda make: dict(zip("qkv", make.qkv().unbind(2), strict=True)), "qk_norm": _folded_example},
        multiplies,
        portable=portable,
    )
)
