"""Backend `sdpa`: attention by `torch.nn.functional.scaled_dot_product_attention`.

On CPU it calls the flash kernel under SDPA, which returns the log-sum-exp that its backward needs. Elsewhere that has a
layout of its own per device and kernel, so it is not exposed, and backward is the plain formula, an image at a time: a
fallback for training where no other backend runs.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internvit.ops.attention import attention_backward_reference, attention_reference
from internvit.ops.core.registration import empty_grad

_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def _flash_on(x: Tensor) -> bool:
    return x.device.type == "cpu" and hasattr(torch.ops.aten, _CPU_FLASH)


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
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format), _empty_lse(q)
    if not _flash_on(q):
        return scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous(), _empty_lse(q)
    out, lse = getattr(torch.ops.aten, _CPU_FLASH)(*heads_first, 0.0, False, scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if _flash_on(q) else 0, dtype=dtype)


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
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if _flash_on(q):
        flash_grads = getattr(torch.ops.aten, f"{_CPU_FLASH}_backward")(
            grad_out.transpose(1, 2), *heads_first, out.transpose(1, 2), lse, 0.0, False, scale=scale
        )
        for destination, grad in zip((grad_q, grad_k, grad_v), flash_grads, strict=True):
            destination.copy_(grad.transpose(1, 2))
    else:
        for image in map(slice, range(q.shape[0]), range(1, q.shape[0] + 1)):
            inputs = q[image], k[image], v[image]
            again, lse = attention_reference(*inputs, scale, None, None, None, None)
            grads = [torch.empty_like(t) for t in inputs]
            attention_backward_reference(grad_out[image], *inputs, again, lse, scale, None, None, None, None, *grads)
            for destination, grad in zip((grad_q, grad_k, grad_v), grads, strict=True):
                destination[image] = grad
    nothing = empty_grad(q)
    return nothing, nothing, nothing, nothing
