"""QK-norm in memory: RMSNorm of q and of k over all heads together.

    q_normed = q * rstd_q * q_weight,  k_normed = k * rstd_k * k_weight,  rstd over all heads together

q, k [B, N, H, D], any strides; q_weight, k_weight [H * D], T or float32; q_normed, k_normed [B, N, H, D], contiguous.
"""

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.registration import define, define_backward
from internvit.ops.core.spec import Inputs, OpSpec, register_spec
from internvit.ops.rms_norm import rms_norm_backward_reference, rms_norm_reference

OP = "qk_norm"


@implements(OP, "reference")
def qk_norm_reference(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, rounding: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q_normed, rstd_q = rms_norm_reference(q.flatten(2), q_weight, eps, rounding)
    k_normed, rstd_k = rms_norm_reference(k.flatten(2), k_weight, eps, rounding)
    return q_normed.view(q.shape), k_normed.view(k.shape), rstd_q, rstd_k


@implements(f"{OP}_backward", "reference")
def qk_norm_backward_reference(  # type: ignore[no-untyped-def]
    grad_q_normed, grad_k_normed, q, k, q_weight, k_weight, rstd_q, rstd_k, output_mask
):
    grads = []
    for grad, x, weight, rstd, mask in (
        (grad_q_normed, q, q_weight, rstd_q, (output_mask[0], output_mask[2])),
        (grad_k_normed, k, k_weight, rstd_k, (output_mask[1], output_mask[3])),
    ):
        grad_x, grad_weight = rms_norm_backward_reference(grad.flatten(2), x.flatten(2), weight, rstd, mask)
        grads.append((None if grad_x is None else grad_x.view(x.shape), grad_weight))
    (grad_q, grad_q_weight), (grad_k, grad_k_weight) = grads
    return grad_q, grad_k, grad_q_weight, grad_k_weight


def _validate(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, rounding: str) -> None:
    check.heads(OP, q=q, k=k)
    check.qk_weights(OP, q, q_weight=q_weight, k_weight=k_weight)
    check.eps(OP, eps)
    check.choice(OP, "rounding", rounding, check.ROUNDINGS)


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_q_normed, grad_k_normed, q, k, q_weight, k_weight, rstd_q, rstd_k, output_mask, backend
) -> None:
    op = f"{OP}_backward"
    check.heads(op, q=q, k=k)
    check.like(op, "q", q, grad_q_normed=grad_q_normed, grad_k_normed=grad_k_normed)
    check.qk_weights(op, q, q_weight=q_weight, k_weight=k_weight)
    check.token_statistics(op, q, rstd_q=rstd_q, rstd_k=rstd_k)
    check.output_mask(op, output_mask, 4)


QK_NORM = define(
    f"{OP}(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, str rounding)"
    " -> (Tensor q_normed, Tensor k_normed, Tensor rstd_q, Tensor rstd_k)",
    fake=lambda q, k, *_: (
        *(t.new_empty(t.shape) for t in (q, k)),
        *(t.new_empty(t.shape[:2], dtype=accumulate_dtype(t)) for t in (q, k)),
    ),
    validate=_validate,
    compiled=("cpu", "cuda"),
)
define_backward(
    QK_NORM,
    f"{OP}_backward(Tensor grad_q_normed, Tensor grad_k_normed, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight,"
    " Tensor rstd_q, Tensor rstd_k, bool[4] output_mask)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_q_weight, Tensor grad_k_weight)",
    validate=_validate_backward,
)


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    *,
    eps: float = 1e-6,
    rounding: str = "fused",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of q and of k over all heads together, written to memory.

    q_normed = q / sqrt(mean(q[b, n]^2) + eps) * q_weight, the same for k

    Args:
        q, k: [B, N, H, D], one dtype and device, any strides.
        q_weight, k_weight: [H * D], q's dtype or float32.
        eps: added to the mean square.
        rounding: "fused" or "reference", as in `rms_norm`.
        backend: overrides `internvit.backend`.

    Returns:
        q_normed, k_normed: [B, N, H, D], q's dtype, contiguous.

    Raises:
        ValueError: a wrong shape, dtype, device or choice.

    Source: InternAttention in OpenGVLab's modeling_intern_vit.py (q_norm, k_norm over embed_dim).
    """
    outputs = QK_NORM.call((q, k, q_weight, k_weight, eps, rounding), backend)
    return outputs[0], outputs[1]


def formula(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """q_normed and k_normed in plain PyTorch."""
    return (
        F.rms_norm(q.flatten(2), q_weight.shape, q_weight, eps).view(q.shape),
        F.rms_norm(k.flatten(2), k_weight.shape, k_weight, eps).view(k.shape),
    )


def _example(make: Inputs) -> dict[str, Any]:
    q, k, _ = make.qkv().unbind(2)
    return {"q": q, "k": k, "q_weight": make.vector(1.0), "k_weight": make.vector(1.0)}


register_spec(OpSpec(qk_norm, OP, formula, {"": _example}))
