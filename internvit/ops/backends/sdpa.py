"""Backend `sdpa`: attention by `torch.nn.functional.scaled_dot_product_attention`.

On CPU it calls the flash kernel under SDPA, which returns the log-sum-exp that its backward needs. Elsewhere that has a
layout of its own per device and kernel, so it is not exposed, and backward is the plain formula, an image at a time: a
fallback for training where no other backend runs.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from internvit.ops.attention import Heads, QKNorm, SavedAttention, attention_backward_reference, attention_reference
from internvit.ops.backends.registry import implements

_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def _flash_on(x: Tensor) -> bool:
    return x.device.type == "cpu" and hasattr(torch.ops.aten, _CPU_FLASH)


@implements("attention", "sdpa")
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None = None) -> tuple[Tensor, Tensor]:
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


@implements("attention_backward", "sdpa")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, out, lse, scale, _ = saved
    heads_first = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if _flash_on(q):
        flash_grads = getattr(torch.ops.aten, f"{_CPU_FLASH}_backward")(
            grad_out.transpose(1, 2), *heads_first, out.transpose(1, 2), lse, 0.0, False, scale=scale
        )
        for destination, grad in zip(grads, flash_grads, strict=True):
            destination.copy_(grad.transpose(1, 2))
    else:
        for image in map(slice, range(q.shape[0]), range(1, q.shape[0] + 1)):
            inputs = q[image], k[image], v[image]
            out, lse = attention_reference(*inputs, scale, None)
            image_grads = grads[0][image], grads[1][image], grads[2][image]
            attention_backward_reference(grad_out[image], SavedAttention(*inputs, out, lse, scale, None), image_grads)
