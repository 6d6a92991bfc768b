"""Backend `cuda`: what its library `internvit_cuda` (csrc/cuda) leaves to others.

Products are cuBLASLt's, which adds the bias in float32 before its one rounding; the library's GELU follows. Attention
is `qk_norm` in memory (the library's), then the flash-attn package where it is installed and takes the tensors, else
torch's SDPA. Their log-sum-exp has no layout in common, so none is kept: backward runs flash-attn's forward once more,
and with SDPA the plain formula, an image at a time. Compiled and run on the host in tests; no GPU has run it.
"""

import torch
from torch import Tensor

from internvit.ops.core.select import BACKENDS, implementation


def _attention_backend(q: Tensor) -> str:
    flash = BACKENDS["flash"]
    usable = flash.missing() is None and flash.rejects(q.device.type, q.dtype, q.shape[-1]) is None
    return "flash" if usable else "sdpa"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out, _ = implementation("attention", _attention_backend(q))(q, k, v, scale, None, None, None, None)
    return out, q.new_empty(0, dtype=torch.float32)


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    rstd_q: Tensor | None,
    rstd_k: Tensor | None,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    name = _attention_backend(q)
    if BACKENDS[name].exposes_lse_on(q.device.type):
        out, lse = implementation("attention", name)(q, k, v, scale, None, None, None, None)
    return implementation("attention_backward", name)(
        grad_out, q, k, v, out, lse, scale, None, None, None, None, grad_q, grad_k, grad_v
    )
