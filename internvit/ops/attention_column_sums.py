"""How much each token of an image is attended to: the sums over the columns of attention, without the score matrix.

    sums[b, h, j] = sum_i softmax(q_hat k_hat^T * scale)_ij = sum_i exp(scale * q_hat_i . k_hat_j - lse[b, h, i])

q, k [B, N, H, D], contiguous in D, any other strides; lse [B, H, N] float32, as attention's forward returns it for the
same q and k, on the same backend; QK-norm inside as in `attention`; sums [B, H, N] float32. With cu_seqlens q and k are
[total, H, D], lse and sums [H, total]. The sums of one head and image add up to N.

It computes q k^T once more, and no product with v. A backend implements
`attention_column_sums(q, k, lse, scale, qk_norm, sequences)`, and its attention returns lse, takes QK-norm and packed
sequences. Rounding lse to float32 is a relative error of 6e-8 |lse| in each probability.
"""

from typing import Any

import torch
from torch import Tensor

from internvit.ops.attention import attention_flops, default_scale, run_attention, validate_qk_norm
from internvit.ops.backends.registry import implementation, implements
from internvit.ops.core import validation as check
from internvit.ops.core.attention_math import all_or_none, column_sums_reference
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import define
from internvit.ops.core.sequences import check_values, default_max_seqlen, pack
from internvit.ops.core.spec import Arguments, Inputs, OpSpec, register_inference_spec

OP = "attention_column_sums"

implements(OP, "reference")(column_sums_reference)


def _run(q: Tensor, k: Tensor, lse: Tensor | None, scale: float, *rest: Any) -> Tensor:
    *inside, cu_seqlens, max_seqlen, backend = rest
    check_values(OP, cu_seqlens, max_seqlen, q.shape[0])
    qk_norm, sequences = all_or_none(*inside), pack(cu_seqlens, max_seqlen, q.shape[0])
    if lse is None:
        lse = run_attention(backend, q, k, k, scale, qk_norm, sequences)[1]
    sums: Tensor = implementation(OP, backend)(q, k, lse, scale, qk_norm, sequences)
    return sums


def _fake(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(check.lse_shape(q), dtype=accumulate_dtype(q))


def _validate(q: Tensor, k: Tensor, lse: Tensor | None, scale: float, *rest: Any) -> None:
    *qk_norm, cu_seqlens, max_seqlen = rest
    check.sequences(OP, "q", q, cu_seqlens, max_seqlen)
    check.heads(OP, varlen=cu_seqlens is not None, q=q, k=k)
    check.scale(OP, scale)
    if lse is not None:
        check.lse(OP, q, lse, "reference")
    validate_qk_norm(OP, q, *qk_norm)


def _raw_fake(*args: Any) -> Tensor:
    inputs, cu_seqlens = args[:8], args[8] if len(args) > 8 else None
    _validate(*inputs, cu_seqlens, None if cu_seqlens is None else 0)
    return _fake(inputs[0])


def _flops(q: tuple[int, ...], k: tuple[int, ...], lse: Any, *rest: Any, **__: Any) -> int:
    return attention_flops(q, 3 if lse is None else 1, rest[-2])


_QK_NORM = "float scale, Tensor? q_weight, Tensor? k_weight, Tensor? rstd_q, Tensor? rstd_k"

ATTENTION_COLUMN_SUMS = define(
    f"{OP}(Tensor q, Tensor k, Tensor? lse, {_QK_NORM}, Tensor? cu_seqlens, SymInt? max_seqlen) -> Tensor",
    fake=_fake,
    validate=_validate,
    run=_run,
    autocast=("q", "k"),
    flops=_flops,
    compiled=("cpu",),
    raw_schema=f"{OP}(Tensor q, Tensor k, Tensor lse, {_QK_NORM}, Tensor? cu_seqlens=None) -> Tensor",
    raw_fake=_raw_fake,
)


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
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
    """How much each token is attended to by all tokens of its image together, of each head.

    sums_j = sum_i softmax(q_hat k_hat^T * scale)_ij

    Args:
        q, k: [B, N, H, D], one dtype and device, contiguous in D; under autocast cast as for torch's products.
        lse: [B, H, N] or [H, total], the log-sum-exp of each row of scores, from attention's forward for these q and k;
            by default attention computes it here, which takes three times as long.
        q_weight, k_weight, rstd_q, rstd_k, scale, cu_seqlens, max_seqlen: as for `attention`.
        backend: overrides `internvit.backend`.

    Returns:
        sums: [B, H, N] or [H, total], float32 (float64 for float64 input). Those of one head and image add up to N.

    Raises:
        ValueError: a wrong shape, dtype, device or combination. RuntimeError in backward: it has no derivative.

    Source: the score by which tokens are kept in EViT (Liang et al. 2022) and FastV (Chen et al. 2024), over all rows.
    """
    max_seqlen = default_max_seqlen(q, cu_seqlens, max_seqlen)
    args = (q, k, lse, default_scale(q, scale), q_weight, k_weight, rstd_q, rstd_k, cu_seqlens, max_seqlen)
    sums: Tensor = ATTENTION_COLUMN_SUMS.call(args, backend)
    return sums


def _hats(q: Tensor, k: Tensor, named: Arguments) -> tuple[Tensor, Tensor]:
    if "q_weight" not in named:
        return q, k
    q_hat, k_hat = (
        x * named[f"rstd_{n}"][..., None, None].to(x.dtype) * named[f"{n}_weight"].view(x.shape[-2:])
        for n, x in (("q", q), ("k", k))
    )
    return q_hat, k_hat


def _formula(q: Tensor, k: Tensor, scale: float | None = None, **named: Any) -> Tensor:
    if "cu_seqlens" in named:
        ends = named["cu_seqlens"][1:-1].tolist()
        images = zip(*(t.tensor_split(ends) for t in _hats(q, k, named)), strict=True)
        return torch.cat([_formula(q[None], k[None], scale)[0] for q, k in images], -1)
    q, k = (t.transpose(1, 2) for t in _hats(q, k, named))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q * scale) @ k.transpose(-1, -2)).softmax(-1).sum(-2)


def _violations(inputs: Arguments, actual: Any, truth: Any, eager: Any) -> list[str]:
    """Relative to the norm of all sums: 1e-4 of the CPU kernel's exponential in 16 bit, and the scores'
    rounding: lse in float32, with QK-norm inside the folded queries in their own dtype."""
    named = {n: t.double() for n, t in inputs.items() if isinstance(t, Tensor) and n != "cu_seqlens"}
    q, k = (t.transpose(-3, -2) * t.shape[-1] ** -0.25 for t in _hats(named["q"], named["k"], named))
    largest = q.norm(dim=-1).amax() * k.norm(dim=-1).amax() if q.numel() else 0.0
    bound = 2e-4 + 4 * torch.finfo(torch.float32).eps * largest
    if "q_weight" in inputs and q.numel():
        terms = q.square() @ k.square().transpose(-2, -1)  # of a score, squared: each has a rounding of its own
        bound += 2 * torch.finfo(inputs["q"].dtype).eps * terms.amax().sqrt()
    error = (actual[0].double() - truth[0]).norm() / truth[0].norm().clamp(min=1e-30)
    return [] if error <= bound else [f"sums are off by {error:.3g} of their norm, expected at most {bound:.3g}"]


def _example(make: Inputs, qkv: Tensor, folded: bool) -> Arguments:
    q, k, _ = qkv.unbind(-3)
    given = {"q": q, "k": k, "scale": q.shape[-1] ** -0.5}
    if not folded:
        return given
    rstd = ((t.float().square().mean((-2, -1)) + 1e-6).rsqrt().to(accumulate_dtype(t)) for t in (q, k))
    weights = {"q_weight": make.vector(1.0), "k_weight": make.vector(1.0)}
    return {**given, **weights, **dict(zip(("rstd_q", "rstd_k"), rstd, strict=True))}


register_inference_spec(
    OpSpec(
        attention_column_sums,
        OP,
        _formula,
        {
            "": lambda make: _example(make, make.qkv(), False),
            "qk_norm": lambda make: _example(make, make.qkv(), True),
            "cu_seqlens": lambda make: {**_example(make, make.packed_qkv(), False), **make.sequences()},
            "qk_norm, cu_seqlens": lambda make: {**_example(make, make.packed_qkv(), True), **make.sequences()},
        },
        _violations,
    )
)
