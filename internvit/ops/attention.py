"""Attention over one image's tokens, with QK-norm inside when its weights and statistics are given.

    out[b, :, h] = softmax(q_hat k_hat^T * scale) v
    q_hat = q * rstd_q[b, n] * q_weight[h * D + d],  k_hat alike;  q_hat = q, k_hat = k without weights

q [B, N, H, D], k, v [B, N_k, H, D], contiguous in D, any other strides; q_weight, k_weight [H * D]; rstd_q, rstd_k
[B, N] float32, with which N_k = N; out [B, N, H, D] contiguous, so that out.flatten(2) is the projection's input; lse
[B, H, N] float32, the natural logarithm of each softmax row's sum (empty where a backend does not expose it). rstd is
an input like any other: it has a gradient, and `qk_norm_attention` closes the chain.

With cu_seqlens, q, k, v and out are [total, H, D], rstd_q and rstd_k [total], lse [H, total]: images of any sizes one
after the other, as in flash-attn's varlen functions. Tokens attend within their image; with cu_seqlens_k queries attend
to as many sequences of keys, of any lengths. Without keys out is 0 and lse -inf, as the sums over none are.

A backend implements `attention(q, k, v, scale, qk_norm, sequences=None) -> (out, lse)`, where `qk_norm` is a `QKNorm`
or None and `sequences` a `Sequences` or None, and `attention_backward(grad_out, saved, grads)`, which fills `grads` and
returns a `QKNormGrads`, None without QK-norm. Only a backend with `varlen` is given sequences.
"""

from typing import Any

import torch
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
from internvit.ops.core.padding import Padding, check_key_padding_mask, sequence_ends, without_padding
from internvit.ops.core.registration import define, define_backward, empty_grad
from internvit.ops.core.select import resolve
from internvit.ops.core.sequences import Sequences, check_values, default_max_seqlen, pack
from internvit.ops.core.spec import Inputs, OpSpec, multiplies, register_spec

OP = "attention"

implements(OP, "reference")(attention_reference)
implements(f"{OP}_backward", "reference")(attention_backward_reference)


def _run(q: Tensor, k: Tensor, v: Tensor, scale: float, *rest: Any) -> tuple[Tensor, Tensor]:
    *qk_norm, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, backend = rest
    sequences = _pack(OP, q, k, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    return run_attention(backend, q, k, v, scale, all_or_none(*qk_norm), sequences)


def _pack(op: str, q: Tensor, k: Tensor, *given: Any) -> Sequences | None:
    cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k = given
    check_values(op, cu_seqlens, max_seqlen, q.shape[0])
    check_values(op, cu_seqlens_k, max_seqlen_k, k.shape[0], "_k")
    return pack(cu_seqlens, max_seqlen, q.shape[0], cu_seqlens_k, max_seqlen_k, k.shape[0])


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
    *inside, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, backend = rest
    sequences = _pack(f"{OP}_backward", q, k, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    qk_norm = all_or_none(*inside)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    saved = SavedAttention(q, k, v, out, lse, scale, qk_norm, sequences)
    qk_norm_grads = implementation(f"{OP}_backward", backend)(grad_out, saved, grads)
    if qk_norm is None:
        return (*grads, *(empty_grad(q) for _ in range(4)))
    q_weight, k_weight, row_dot_q, row_dot_k = qk_norm_grads
    return (*grads, q_weight, k_weight, row_dot_q.sum(-2) / qk_norm.rstd_q, row_dot_k.sum(-2) / qk_norm.rstd_k)


def fake_out_and_lse(q: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    lse_shape = check.lse_shape(q) if BACKENDS[backend].exposes_lse_on(q.device.type) else (0,)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=accumulate_dtype(q))


def attention_flops(q: tuple[int, ...], products: int, max_seqlen: int | None = None, keys: int | None = None) -> int:
    """FLOPs of `products` matrix products over all pairs of tokens; q [B, N, H, D] or the packed [B, N, 3, H, D].

    With max_seqlen q is [total, H, D] or [total, 3, H, D], and every sequence is counted as one with that many keys:
    shapes do not tell the others. `keys`: of an image, where they are not as many as the queries.
    """
    heads, head_dim = q[-2:]
    pairs = q[0] * q[1] * (q[1] if keys is None else keys) if max_seqlen is None else q[0] * max_seqlen
    return products * 2 * pairs * heads * head_dim


def _flops(products: int, q: tuple[int, ...], k: tuple[int, ...], *rest: Any) -> int:
    *_, max_seqlen, _, max_seqlen_k, _ = rest
    return attention_flops(q, products, max_seqlen if max_seqlen_k is None else max_seqlen_k, k[1])


def _validate(q: Tensor, k: Tensor, v: Tensor, scale: float, *rest: Any) -> None:
    _validate_heads(OP, q, k, v, scale, *rest)


def _validate_heads(op: str, q: Tensor, k: Tensor, v: Tensor, scale: float, *rest: Any) -> None:
    *qk_norm, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k = rest
    check.sequences(op, "q", q, cu_seqlens, max_seqlen)
    check.key_sequences(op, q, cu_seqlens, cu_seqlens_k, max_seqlen_k)
    check.heads(op, varlen=cu_seqlens is not None, q=q)
    plain = all(t is None for t in qk_norm)
    if cu_seqlens_k is not None and not plain:
        raise ValueError(f"{op}: cu_seqlens_k must be None with QK-norm inside, whose queries and keys are one token's")
    check.keys(op, q, k, v, own_length=plain and (cu_seqlens is None or cu_seqlens_k is not None))
    check.scale(op, scale)
    validate_qk_norm(op, q, *qk_norm)


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
    grad_out, q, k, v, out, lse, *rest, backend = args
    op = f"{OP}_backward"
    _validate_heads(op, q, k, v, *rest)
    check.like(op, "q", q, grad_out=grad_out, out=out)
    check.lse(op, q, lse, backend)


def _with_lengths(*ends: Tensor | None) -> tuple[Any, ...]:
    """cu_seqlens and cu_seqlens_k as the op takes them: a library reads the longest sequence itself."""
    both = (*ends, None, None)[:2]
    return tuple(value for t in both for value in (t, None if t is None else 0))


def _raw_fake(*args: Any) -> tuple[Tensor, Tensor]:
    _validate(*args[:8], *_with_lengths(*args[8:]))
    return fake_out_and_lse(args[0], "cpu")


def _raw_fake_backward(*args: Any) -> tuple[Tensor, ...]:
    saved, (grad_q, grad_k, grad_v) = args[:11], args[11:14]
    _validate_backward(*saved, *_with_lengths(*args[14:]), "cpu")
    q, k, q_weight, k_weight = saved[1], saved[2], saved[7], saved[8]
    check.written(f"{OP}_backward", "q", q, grad_q=grad_q)
    check.written(f"{OP}_backward", "k", k, grad_k=grad_k, grad_v=grad_v)
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
_SEQUENCES = "Tensor? cu_seqlens, SymInt? max_seqlen, Tensor? cu_seqlens_k, SymInt? max_seqlen_k"
_RAW_SEQUENCES = "Tensor? cu_seqlens=None, Tensor? cu_seqlens_k=None"

ATTENTION = define(
    f"{_RAW_INPUTS}, {_SEQUENCES}) -> (Tensor out, Tensor lse)",
    fake=lambda q, *rest: fake_out_and_lse(q, rest[-1]),
    validate=_validate,
    run=_run,
    autocast=("q", "k", "v"),
    choose=lambda args, asked: resolve(
        OP, args[0], asked, args[0].shape[-1], folded=args[4] is not None, varlen=args[8] is not None
    ),
    flops=lambda *args, **__: _flops(2, *args),  # q k^T and p v
    compiled=("cpu",),
    raw_schema=f"{_RAW_INPUTS}, {_RAW_SEQUENCES}) -> (Tensor out, Tensor lse)",
    raw_fake=_raw_fake,
)
define_backward(
    ATTENTION,
    f"{_RAW_SAVED}, {_SEQUENCES}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_q_weight,"
    " Tensor grad_k_weight, Tensor grad_rstd_q, Tensor grad_rstd_k)",
    validate=_validate_backward,
    run=_run_backward,
    flops=lambda grad_out, *args, **__: _flops(5, *args),  # dv, dp, dq, dk, and the scores again
    raw_schema=f"{_RAW_SAVED}, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v, {_RAW_SEQUENCES})"
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
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention without dropout; with weights and statistics, QK-norm happens inside.

    out = softmax(q_hat k_hat^T * scale) v,  q_hat = q * rstd_q * q_weight,  k_hat = k * rstd_k * k_weight

    A query without a key, be it that N_k is 0 or that all keys are padding, has out 0 and gradients 0.

    Args:
        q: [B, N, H, D], contiguous in D (views of a packed [B, N, 3, H, D] need no copy).
        k, v: [B, N_k, H, D], q's dtype and device; with QK-norm inside N_k = N. Under autocast 16- and 32-bit floats
            are cast as for torch's products.
        q_weight, k_weight: [H * D], q's dtype or float32, QK-norm's weights over all heads.
        rstd_q, rstd_k: [B, N], the statistics of QK-norm. All four are given, or none.
        scale: of the scores; 1 / sqrt(D) by default.
        cu_seqlens: [B + 1] int32, packed sequences: q, k, v are [total, H, D], rstd_q and rstd_k [total], and tokens
            cu_seqlens[b] to cu_seqlens[b + 1] attend to one another. It begins with 0, does not decrease and ends with
            total, which is checked on a CPU; on a GPU its values are not read back, and wrong ones give wrong results.
        max_seqlen: the longest sequence or more. By default it is computed on a CPU, and is total on a GPU, which
            costs time; give it there.
        cu_seqlens_k, max_seqlen_k: [B + 1] int32 and the longest, of k, v [total_k, H, D]; the queries' by default.
            Not with QK-norm inside.
        key_padding_mask: bool [B, N_k], True for keys that are left out, as in torch.nn.MultiheadAttention; no mask of
            scores is made. Padding gets gradients of 0. With QK-norm inside queries and keys are the same tokens:
            queries that are padding have out 0. Not beside cu_seqlens.
        backend: overrides `internvit.backend`; "sdpa" and "flash" exist for attention alone and take no weights.

    Returns:
        out: [B, N, H, D] or [total, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or combination.

    Source: Vaswani et al. 2017; InternAttention in OpenGVLab's modeling_intern_vit.py; cu_seqlens as in
    flash_attn_varlen_func of Dao-AILab/flash-attention.
    """
    inputs = (q, k, v, default_scale(q, scale), q_weight, k_weight, rstd_q, rstd_k)
    if key_padding_mask is not None:
        check_key_padding_mask(OP, key_padding_mask, q, k, cu_seqlens, cu_seqlens_k)
        return _attention_of_unpadded(key_padding_mask, *inputs, backend=backend)
    max_seqlen = default_max_seqlen(q, cu_seqlens, max_seqlen)
    max_seqlen_k = default_max_seqlen(k, cu_seqlens_k, max_seqlen_k)
    return ATTENTION.call((*inputs, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k), backend)[0]


def _attention_of_unpadded(
    key_padding_mask: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: Any, *qk_norm: Tensor | None, backend: str | None
) -> Tensor:
    _validate(q, k, v, scale, *qk_norm, *[None] * 4)
    padding, (batch, tokens) = Padding.of(key_padding_mask), q.shape[:2]
    settings: dict[str, Any] = {"scale": scale, "backend": backend}
    q_weight, k_weight, rstd_q, rstd_k = qk_norm
    if rstd_q is not None and rstd_k is not None:
        rstd = padding.pack(rstd_q, 1.0), padding.pack(rstd_k, 1.0)
        inputs = (*padding.pack_heads(q, k, v), q_weight, k_weight, *rstd)
        return padding.unpack(attention(*inputs, cu_seqlens=padding.ends, max_seqlen=tokens, **settings))
    every_query = torch.full((batch,), tokens, device=q.device)  # the first sequence of an image has all its queries
    out = attention(
        q.flatten(0, 1),
        padding.pack(k, 0.0),
        padding.pack(v, 0.0),
        cu_seqlens=sequence_ends(every_query, tokens),
        max_seqlen=tokens,
        cu_seqlens_k=padding.ends,
        max_seqlen_k=k.shape[1],
        **settings,
    )
    return out.unflatten(0, (batch, tokens))


def default_scale(q: Any, scale: float | None) -> float | None:
    """1 / sqrt(D) by default; None where q is no tensor, which validation says."""
    if scale is not None or not isinstance(q, Tensor) or q.dim() == 0 or q.shape[-1] == 0:
        return scale
    return q.shape[-1] ** -0.5


def _folded_formula(q: Tensor, k: Tensor, v: Tensor, *qk_norm: Tensor, **named: Any) -> Tensor:
    weights = dict(zip(QKNorm._fields, qk_norm, strict=False)) | named
    settings = {n: weights.pop(n) for n in (*Sequences._fields, "key_padding_mask") if n in weights}
    if not weights:
        return formula(q, k, v, **settings)
    q_hat, k_hat = (
        x * weights[f"rstd_{n}"].to(x.dtype)[..., None, None] * weights[f"{n}_weight"].view(x.shape[-2:])
        for n, x in (("q", q), ("k", k))
    )
    out = formula(q_hat, k_hat, v, **settings)
    return without_padding(out, settings.get("key_padding_mask"))


def heads_example(qkv: Tensor) -> dict[str, Any]:
    return dict(zip("qkv", qkv.unbind(-3), strict=True))


def _folded_example(make: Inputs, qkv: Tensor) -> dict[str, Any]:
    heads = heads_example(qkv)
    rstd = {f"rstd_{n}": (heads[n].float().square().mean((-2, -1)) + 1e-6).rsqrt() for n in "qk"}
    rstd = {n: t.to(accumulate_dtype(qkv)) for n, t in rstd.items()}
    return {**heads, "q_weight": make.vector(1.0), "k_weight": make.vector(1.0), **rstd}


register_spec(
    OpSpec(
        attention,
        OP,
        _folded_formula,
        {
            "": lambda make: heads_example(make.qkv()),
            "qk_norm": lambda make: _folded_example(make, make.qkv()),
            "cu_seqlens": lambda make: {**heads_example(make.packed_qkv()), **make.sequences()},
            "qk_norm, cu_seqlens": lambda make: {**_folded_example(make, make.packed_qkv()), **make.sequences()},
            "keys": lambda make: heads_example(make.qkv()) | make.keys_and_values(),
            "keys, cu_seqlens": lambda make: heads_example(make.packed_qkv()) | make.packed_keys_and_values(),
            "key_padding_mask": lambda make: heads_example(make.qkv()) | make.padded_keys_and_values(),
            "qk_norm, key_padding_mask": lambda make: _folded_example(make, make.qkv()) | make.padding(),
        },
        multiplies,
        portable=portable,
    )
)
