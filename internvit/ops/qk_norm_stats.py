"""The statistics of QK-norm: one number per token for q and one for k, over all heads together.

    rstd_q[b, n] = 1 / sqrt(mean over (h, d) of q[b, n, h, d]^2 + eps),  the same for k

q, k [B, N, H, D], contiguous in D, any other strides (views of a packed qkv buffer, or separate tensors);
rstd_q, rstd_k [B, N] float32 (float64 for float64 input). With these, `attention` normalises q and k inside.
"""

from typing import Any

from torch import Tensor

from internvit.ops.backends.registry import implementation, implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, statistics
from internvit.ops.core.registration import define, define_backward
from internvit.ops.core.spec import OpSpec, register_spec

OP = "qk_norm_stats"


@implements(OP, "reference")
def qk_norm_stats_reference(q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return statistics(q.flatten(2), "rms_norm", eps)[1], statistics(k.flatten(2), "rms_norm", eps)[1]


@implements(f"{OP}_backward", "reference")
def qk_norm_stats_backward_reference(  # type: ignore[no-untyped-def]
    grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, grad_q, grad_k
):
    """Adds the gradient that flows through the statistics to grad_q and grad_k, in place.

    grad_x -= grad_rstd * rstd^3 / C * x
    """
    channels = q.shape[2] * q.shape[3]
    for grad_rstd, x, rstd, grad_x in ((grad_rstd_q, q, rstd_q, grad_q), (grad_rstd_k, k, rstd_k, grad_k)):
        slope = (grad_rstd * rstd.pow(3) / channels)[:, :, None, None]
        grad_x.copy_(grad_x.to(slope.dtype) - slope * x.to(slope.dtype))


def _run_backward(
    grad_rstd_q: Tensor, grad_rstd_k: Tensor, q: Tensor, k: Tensor, rstd_q: Tensor, rstd_k: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    grad_q, grad_k = q.new_zeros(q.shape), k.new_zeros(k.shape)
    implementation(f"{OP}_backward", backend)(grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, grad_q, grad_k)
    return grad_q, grad_k


def _validate(q: Tensor, k: Tensor, eps: float) -> None:
    check.heads(OP, q=q, k=k)
    check.eps(OP, eps)


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, backend
) -> None:
    op = f"{OP}_backward"
    check.heads(op, q=q, k=k)
    statistics = {"grad_rstd_q": grad_rstd_q, "grad_rstd_k": grad_rstd_k, "rstd_q": rstd_q, "rstd_k": rstd_k}
    check.token_statistics(op, q, **statistics)


def _raw_fake_backward(*args: Any) -> None:
    grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, grad_q, grad_k = args
    _validate_backward(grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, "cpu")
    check.written(f"{OP}_backward", "q", q, grad_q=grad_q, grad_k=grad_k)


QK_NORM_STATS = define(
    f"{OP}(Tensor q, Tensor k, float eps) -> (Tensor rstd_q, Tensor rstd_k)",
    fake=lambda q, k, *_: tuple(t.new_empty(t.shape[:2], dtype=accumulate_dtype(t)) for t in (q, k)),
    validate=_validate,
    compiled=("cpu", "cuda"),
)
define_backward(
    QK_NORM_STATS,
    f"{OP}_backward(Tensor grad_rstd_q, Tensor grad_rstd_k, Tensor q, Tensor k, Tensor rstd_q, Tensor rstd_k)"
    " -> (Tensor grad_q, Tensor grad_k)",
    validate=_validate_backward,
    run=_run_backward,
    raw_schema=f"{OP}_backward(Tensor grad_rstd_q, Tensor grad_rstd_k, Tensor q, Tensor k, Tensor rstd_q,"
    " Tensor rstd_k, Tensor(a!) grad_q, Tensor(b!) grad_k) -> ()",
    raw_fake=_raw_fake_backward,
)


def qk_norm_stats(q: Tensor, k: Tensor, *, eps: float = 1e-6, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The reciprocal root mean square of each token of q and of k, over all heads together.

    rstd_q[b, n] = 1 / sqrt(mean(q[b, n]^2) + eps)

    Args:
        q, k: [B, N, H, D], one dtype and device, any strides.
        eps: added to the mean square.
        backend: overrides `internvit.backend`.

    Returns:
        rstd_q, rstd_k: [B, N] float32 (float64 for float64 input).

    Raises:
        ValueError: a wrong shape, dtype or device.

    Source: InternAttention in OpenGVLab's modeling_intern_vit.py (q_norm, k_norm over embed_dim).
    """
    return QK_NORM_STATS.call((q, k, eps), backend)


def _formula(q: Tensor, k: Tensor, eps: float = 1e-6) -> tuple[Tensor, ...]:
    return tuple((t.to(accumulate_dtype(t)).square().mean((-2, -1)) + eps).rsqrt() for t in (q, k))


register_spec(
    OpSpec(qk_norm_stats, OP, _formula, {"": lambda make: dict(zip("qk", make.qkv().unbind(2), strict=False))})
)
