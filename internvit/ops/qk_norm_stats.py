"""The statistics of QK-norm: one number per token for q and one for k, over all heads together.

    rstd_q[b, n] = 1 / sqrt(mean over (h, d) of q[b, n, h, d]^2 + eps),  the same for k

q, k [B, N, H, D], contiguous in D, any other strides (views of a packed qkv buffer, or separate tensors);
rstd_q, rstd_k [B, N] float32 (float64 for float64 input). With these, `attention` normalises q and k inside.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, statistics
from internvit.ops.core.registration import below_autograd, define
from internvit.ops.core.select import implementation, reference, resolve

OP = "qk_norm_stats"


@reference(OP)
def qk_norm_stats_reference(q: Tensor, k: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return statistics(q.flatten(2), "rms_norm", eps)[1], statistics(k.flatten(2), "rms_norm", eps)[1]


@reference(f"{OP}_backward")
def qk_norm_stats_backward_reference(
    grad_rstd_q: Tensor,
    grad_rstd_k: Tensor,
    q: Tensor,
    k: Tensor,
    rstd_q: Tensor,
    rstd_k: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
) -> None:
    """Adds the gradient that flows through the statistics to grad_q and grad_k, in place.

    grad_x -= grad_rstd * rstd^3 / C * x
    """
    channels = q.shape[2] * q.shape[3]
    for grad_rstd, x, rstd, grad_x in ((grad_rstd_q, q, rstd_q, grad_q), (grad_rstd_k, k, rstd_k, grad_k)):
        slope = (grad_rstd * rstd.pow(3) / channels)[:, :, None, None]
        grad_x.copy_(grad_x.to(slope.dtype) - slope * x.to(slope.dtype))


class QKNormStatsFunction(Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
        rstd_q, rstd_k = below_autograd(QK_NORM_STATS, q, k, eps, backend)
        ctx.save_for_backward(q, k, rstd_q, rstd_k)
        ctx.backend = backend
        return rstd_q, rstd_k

    @staticmethod
    def backward(ctx: Any, grad_rstd_q: Tensor, grad_rstd_k: Tensor) -> tuple[Tensor | None, ...]:
        grad_q, grad_k = QK_NORM_STATS_BACKWARD(grad_rstd_q, grad_rstd_k, *ctx.saved_tensors, ctx.backend)
        return grad_q, grad_k, None, None


def _run_backward(
    grad_rstd_q: Tensor, grad_rstd_k: Tensor, q: Tensor, k: Tensor, rstd_q: Tensor, rstd_k: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    grad_q, grad_k = q.new_zeros(q.shape), k.new_zeros(k.shape)
    implementation(f"{OP}_backward", backend)(grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, grad_q, grad_k)
    return grad_q, grad_k


QK_NORM_STATS = define(
    f"{OP}(Tensor q, Tensor k, float eps, str backend) -> (Tensor rstd_q, Tensor rstd_k)",
    fake=lambda q, k, eps, backend: (
        q.new_empty(q.shape[:2], dtype=accumulate_dtype(q)),
        k.new_empty(k.shape[:2], dtype=accumulate_dtype(k)),
    ),
    autograd=QKNormStatsFunction,
)
QK_NORM_STATS_BACKWARD = define(
    f"{OP}_backward(Tensor grad_rstd_q, Tensor grad_rstd_k, Tensor q, Tensor k, Tensor rstd_q, Tensor rstd_k,"
    " str backend) -> (Tensor grad_q, Tensor grad_k)",
    fake=lambda grad_rstd_q, grad_rstd_k, q, k, rstd_q, rstd_k, backend: (q.new_empty(q.shape), k.new_empty(k.shape)),
    run=_run_backward,
)


def qk_norm_stats(q: Tensor, k: Tensor, eps: float = 1e-6, backend: str | None = None) -> tuple[Tensor, Tensor]:
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
    check.heads(OP, q=q, k=k)
    check.eps(OP, eps)
    return QK_NORM_STATS(q, k, eps, resolve(OP, q, backend))
