"""Attention over one image's tokens, with QK-norm inside when its weights and statistics are given.

    out[b, :, h] = softmax(q_hat k_hat^T * scale) v
    q_hat = q * rstd_q[b, n] * q_weight[h * D + d],  k_hat alike;  q_hat = q, k_hat = k without weights

q, k, v [B, N, H, D], contiguous in D, any other strides; q_weight, k_weight [H * D]; rstd_q, rstd_k [B, N] float32;
out [B, N, H, D] contiguous, so that out.flatten(2) is the projection's input; lse [B, H, N] float32, the natural
logarithm of each softmax row's sum (empty where a backend does not expose it). rstd is an input like any other: it has
a gradient, and `qk_norm_attention` closes the chain.

With cu_seqlens, q, k, v and out are [total, H, D], rstd_q and rstd_k [total], lse [H, total]: images of any sizes one
after the other, as in flash-attn's varlen functions. Tokens attend within their image.

A backend implements `attention(q, k, v, scale, qk_norm, sequences=None) -> (out, lse)`, where `qk_norm` is a `QKNorm`
or None and `sequences` a `Sequences` or None, and `attention_backward(grad_out, saved, grads)`, which fills `grads` and
returns a `QKNormGrads`, None without QK-norm. Only a backend with `varlen` is given sequences.
"""

from typing import Any

from torch import Tensor

from internvit.ops.backends.registry import BACKENDS, implementation, implements
from internvit.ops.core import validation as check
from internvit.ops.core.attention_math import (
    QKNorm,
    SavedAttention,
    all_or_none,
    attention_backward_reference,
    attention_reference,
    formula,
    portable,
)
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import define, define_backward, empty_grad
from internvit.ops.core.select import resolve
from internvit.ops.core.sequences import Sequences, check_values, default_max_seqlen, pack
from internvit.ops.core.spec import Inputs, OpSpec, multiplies, register_spec

OP = "attention"

implements(OP, "reference")(attention_reference)
implements(f"{OP}_backward", "reference")(attention_backward_reference)


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
    *qk_norm, cu_seqlens, max_seqlen, backend = rest
    check_values(OP, cu_seqlens, max_seqlen, q.shape[0])
    return run_attention(backend, q, k, v, scale, all_or_none(*qk_norm), pack(cu_seqlens, max_seqlen, q.shape[0]))


def run_attention(
    backend: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    qk_norm: QKNorm | None,
    sequences: Sequences | None,
) -> tuple[Tensor, Tensor]:
    """A backend without `varlen` need not know of sequences."""
    given = () if sequences is None else (sequences,)
    return implementation(OP, backend)(q, k, v, scale, qk_norm, *given)


def _run_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *rest: Any
) -> tuple[Tensor, ...]:
    *inside, cu_seqlens, max_seqlen, backend = rest
    check_values(f"{OP}_backward", cu_seqlens, max_seqlen, q.shape[0])
    qk_norm = all_or_none(*inside)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    saved = SavedAttention(q, k, v, out, lse, scale, qk_norm, pack(cu_seqlens, max_seqlen, q.shape[0]))
    qk_norm_grads = implementation(f"{OP}_backward", backend)(grad_out, saved, grads)
    if qk_norm is None:
        return (*grads, *(empty_grad(q) for _ in range(4)))
    q_weight, k_weight, row_dot_q, row_dot_k = qk_norm_grads
    return (*grads, q_weight, k_weight, row_dot_q.sum(-2) / qk_norm.rstd_q, row_dot_k.sum(-2) / qk_norm.rstd_k)


def fake_out_and_lse(q: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    lse_shape = check.lse_shape(q) if BACKENDS[backend].exposes_lse_on(q.device.type) else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=accumulate_dtype(q))


def attention_flops(q: tuple[int, ...], products: int, max_seqlen: int | None = None) -> int:
    """FLOPs of `products` matrix products over all pairs of tokens; q [B, N, H, D] or the packed [B, N, 3, H, D].

    With max_seqlen q is [total, H, D] or [total, 3, H, D], and every sequence is counted as one of that length: shapes
    do not tell the others.
    """
    heads, head_dim = q[-2:]
    pairs = q[0] * q[1] * q[1] if max_seqlen is None else q[0] * max_seqlen
    return products * 2 * pairs * heads * head_dim


def _validate(q: Tensor, k: Tensor, v: Tensor, scale: float, *rest: Any) -> None:
    *qk_norm, cu_seqlens, max_seqlen = rest
    check.sequences(OP, "q", q, cu_seqlens, max_seqlen)
    check.heads(OP, varlen=cu_seqlens is not None, q=q, k=k, v=v)
    check.scale(OP, scale)
    validate_qk_norm(OP, q, *qk_norm)


def validate_qk_norm(op: str, q: Tensor, *qk_norm: Tensor | None) -> None:
    """Weights and statistics of QK-norm, all four or none."""
    given = dict(zip(QKNorm._fields, qk_norm, strict=True))
    absent = [name for name, t in given.items() if t is None]
    if 0 < len(absent) < 4:
        raise ValueError(f"{op}: {', '.join(given)} go together, got None for {', '.join(absent)}")
    if not absent:
        check.qk_weights(op, q, q_weight=given["q_weight"], k_weight=given["k_weight"])
        check.token_statistics(op, q, rstd_q=given["rstd_q"], rstd_k=given["rstd_k"])


def _validate_backward(*args: Any) -> None:
    grad_out, q, k, v, out, lse, scale, *qk_norm, cu_seqlens, max_seqlen, backend = args
    op = f"{OP}_backward"
    check.sequences(op, "q", q, cu_seqlens, max_seqlen)
    check.heads(op, varlen=cu_seqlens is not None, q=q, k=k, v=v)
    check.scale(op, scale)
    check.like(op, "q", q, grad_out=grad_out, out=out)
    check.lse(op, q, lse, backend)
    validate_qk_norm(op, q, *qk_norm)


def _raw_fake(*args: Any) -> tuple[Tensor, Tensor]:
    inputs, cu_seqlens = args[:8], args[8] if len(args) > 8 else None
    _validate(*inputs, cu_seqlens, None if cu_seqlens is None else 0)
    return fake_out_and_lse(inputs[0], "cpu")


def _raw_fake_backward(*args: Any) -> tuple[Tensor, ...]:
    saved, (grad_q, grad_k, grad_v), cu_seqlens = args[:11], args[11:14], args[14] if len(args) > 14 else None
    _validate_backward(*saved, cu_seqlens, None if cu_seqlens is None else 0, "cpu")
    q, q_weight, k_weight = saved[1], saved[7], saved[8]
    check.written(f"{OP}_backward", "q", q, grad_q=grad_q, grad_k=grad_k, grad_v=grad_v)
    if q_weight is None:
        return tuple(empty_grad(q) for _ in range(4))
    row_dots = (q.new_empty(check.lse_shape(q), dtype=accumulate_dtype(q)) for _ in range(2))
    return (q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape), *row_dots)


_RAW_INPUTS = (
    f"{OP}(Tensor q, Tensor k, Tensor v, float scale, Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q,"
    " Tensor? rstd_k"
)
_RAW_SAVED = (
    f"{OP}_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale,"
    " Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q, Tensor? rstd_k"
)
_SEQUENCES = "Tensor? cu_seqlens, SymInt? max_seqlen"

ATTENTION = define(
    f"{_RAW_INPUTS}, {_SEQUENCES}) -> (Tensor out, Tensor lse)",
    fake=lambda q, *rest: fake_out_and_lse(q, rest[-1]),
    validate=_validate,
    run=_run,
    autocast=("q", "k", "v"),
    choose=lambda args, asked: resolve(
        OP, args[0], asked, args[0].shape[-1], folded=args[4] is not None, varlen=args[8] is not None
    ),
    flops=lambda q, *rest, **__: attention_flops(q, 2, rest[-2]),  # q k^T and p v
    compiled=("cpu",),
    raw_schema=f"{_RAW_INPUTS}, Tensor? cu_seqlens=None) -> (Tensor out, Tensor lse)",
    raw_fake=_raw_fake,
)
define_backward(
    ATTENTION,
    f"{_RAW_SAVED}, {_SEQUENCES}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_weight,"
    " Tensor grad_k_weight, Tensor grad_rstd_q, Tensor grad_rstd_k)",
    validate=_validate_backward,
    run=_run_backward,
    flops=lambda grad_out, q, *rest, **__: attention_flops(q, 5, rest[-2]),  # dv, dp, dq, dk, and the scores again
    raw_schema=f"{_RAW_SAVED}, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, Tensor? cu_seqlens=None)"
    " -> (Tensor grad_q_weight, Tensor grad_k_weight, Tensor row_dot_q, Tensor row_dot_k)",
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
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
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
        cu_seqlens: [B + 1] int32, packed sequences: q, k, v are [total, H, D], rstd_q and rstd_k [total], and tokens
            cu_seqlens[b] to cu_seqlens[b + 1] attend to one another. It begins with 0, does not decrease and ends with
            total, which is checked on a CPU; on a GPU its values are not read back, and wrong ones give wrong results.
        max_seqlen: the longest sequence or more. By default it is computed on a CPU, and is total on a GPU, which
            costs time; give it there.
        backend: overrides `internvit.backend`; "sdpa" and "flash" exist for attention alone and take no weights.

    Returns:
        out: [B, N, H, D] or [total, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: Vaswani et al. 2017; InternAttention in OpenGVLab's modeling_intern_vit.py; cu_seqlens as in
    flash_attn_varlen_func of Dao-AILab/flash-attention.
    """
    max_seqlen = default_max_seqlen(q, cu_seqlens, max_seqlen)
    args = (q, k, v, default_scale(q, scale), q_weight, k_weight, rstd_q, rstd_k, cu_seqlens, max_seqlen)
    return ATTENTION.call(args, backend)[0]


def default_scale(q: Any, scale: float | None) -> float | None:
    """1 / sqrt(D) by default; None where q is no tensor, which validation says."""
    if scale is not None or not isinstance(q, Tensor) or q.dim() == 0 or q.shape[-1] == 0:
        return scale
    return q.shape[-1] ** -0.5


def _folded_formula(q: Tensor, k: Tensor, v: Tensor, *qk_norm: Tensor, **named: Any) -> Tensor:
    weights = dict(zip(QKNorm._fields, qk_norm, strict=False)) | named
    packed = {n: weights.pop(n) for n in Sequences._fields if n in weights}
    if not weights:
        return formula(q, k, v, **packed)
    q_hat, k_hat = (
        x * weights[f"rstd_{n}"].to(x.dtype)[..., None, None] * weights[f"{n}_weight"].view(x.shape[-2:])
        for n, x in (("q", q), ("k", k))
    )
    return formula(q_hat, k_hat, v, **packed)


def _plain_example(qkv: Tensor) -> dict[str, Any]:
    return dict(zip("qkv", qkv.unbind(-3), strict=True))


def _folded_example(make: Inputs, qkv: Tensor) -> dict[str, Any]:
    heads = _plain_example(qkv)
    rstd = {f"rstd_{n}": (heads[n].float().square().mean((-2, -1)) + 1e-6).rsqrt() for n in "qk"}
    rstd = {n: t.to(accumulate_dtype(qkv)) for n, t in rstd.items()}
    return {**heads, "q_weight": make.vector(1.0), "k_weight": make.vector(1.0), **rstd}


register_spec(
    OpSpec(
        attention,
        OP,
        _folded_formula,
        {
            "": lambda make: _plain_example(make.qkv()),
            "qk_norm": lambda make: _folded_example(make, make.qkv()),
            "cu_seqlens": lambda make: {**_plain_example(make.packed_qkv()), **make.sequences()},
            "qk_norm, cu_seqlens": lambda make: {**_folded_example(make, make.packed_qkv()), **make.sequences()},
        },
        multiplies,
        portable=portable,
    )
)
