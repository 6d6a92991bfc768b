"""Backend `sdpa`: attention by the kernels under `torch.nn.functional.scaled_dot_product_attention`.

Each returns the log-sum-exp that its backward needs: flash attention on a CPU, flash, memory-efficient or cuDNN
attention on a GPU, whichever SDPA itself would take. Where none takes the tensors, forward and backward are the plain
formula, an image at a time: a fallback. Compiled for no GPU here, and run on none: the calls are written against the
schemas of torch 2.14.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from internvit.ops.backends.registry import implements
from internvit.ops.core.attention_math import (
    Heads,
    QKNorm,
    SavedAttention,
    attention_backward_reference,
    attention_reference,
)
from internvit.ops.core.norm_math import accumulate_dtype
from internvit.ops.core.sequences import Sequences

Grads = tuple[Tensor, Tensor, Tensor]
aten = torch.ops.aten
_CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def _cpu_flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return getattr(aten, _CPU_FLASH)(q, k, v, 0.0, False, scale=scale)


def _cpu_flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Grads:
    return getattr(aten, f"{_CPU_FLASH}_backward")(grad, q, k, v, out, lse, 0.0, False, scale=scale)


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Grads:
    seed = q.new_zeros(2, dtype=torch.uint64), q.new_zeros((), dtype=torch.uint64)  # of no dropout
    lengths = None, None, q.shape[2], k.shape[2]
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, False, *seed, scale=scale
    )


def _efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, False, scale=scale)
    return out, lse[..., : q.shape[2]]  # rows are padded to a multiple of 32


def _efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Grads:
    seed = q.new_zeros((), dtype=torch.int64), q.new_zeros((), dtype=torch.int64)
    padded = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
    mask = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, None, out, padded, *seed, 0.0, mask, False, scale=scale
    )[:3]


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False, scale=scale)
    return out, lse.view(q.shape[:3])


def _cudnn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Grads:
    seed = q.new_zeros((), dtype=torch.int64), q.new_zeros((), dtype=torch.int64)
    lengths = None, None, q.shape[2], k.shape[2]
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), *seed, None, *lengths, 0.0, False, scale=scale
    )


def _plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    images = zip(*(t.transpose(1, 2).split(1) for t in (q, k, v)), strict=True)
    results = [attention_reference(q, k, v, scale, None) for q, k, v in images]
    out, lse = (torch.cat(parts) for parts in zip(*results, strict=True))
    return out.transpose(1, 2), lse


def _plain_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> Grads:
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for i in range(q.shape[0]):
        image = slice(i, i + 1)
        grad_i, q_i, k_i, v_i, out_i = (t[image].transpose(1, 2) for t in (grad, q, k, v, out))
        grads_i = grads[0][image].transpose(1, 2), grads[1][image].transpose(1, 2), grads[2][image].transpose(1, 2)
        saved = SavedAttention(q_i, k_i, v_i, out_i, lse[image], scale, None)
        attention_backward_reference(grad_i, saved, grads_i)
    return grads


_PLAIN = _plain, _plain_backward
_KERNELS: dict[int, tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Grads]]] = {
    SDPBackend.FLASH_ATTENTION.value: (_flash, _flash_backward),
    SDPBackend.EFFICIENT_ATTENTION.value: (_efficient, _efficient_backward),
    SDPBackend.CUDNN_ATTENTION.value: (_cudnn, _cudnn_backward),
}


def _kernels(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward for q, k, v [B, H, N, D]: what SDPA takes for inputs without dropout and mask."""
    if q.device.type == "cpu" and hasattr(aten, _CPU_FLASH):
        return _cpu_flash, _cpu_flash_backward
    if q.device.type != "cuda" or q.shape[-1] % 8:  # SDPA pads such heads before its kernels
        return _PLAIN
    with torch.no_grad():
        choice = torch._fused_sdp_choice(q.detach(), k.detach(), v.detach(), scale=scale)
    return _KERNELS.get(choice, _PLAIN)


def _heads_first(t: Tensor) -> Tensor:
    """t [B, N, H, D] as [B, H, N, D] with D contiguous: the CPU kernel reads past its tensors otherwise."""
    return (t if t.stride(-1) == 1 else t.contiguous()).transpose(1, 2)


@implements("attention", "sdpa")
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    qk_norm: QKNorm | None = None,
    sequences: Sequences | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed sequences one after the other; on a GPU their lengths are read back, which waits for the device."""
    if sequences is not None:
        return _attention_one_by_one(q, k, v, scale, sequences)
    heads_first = _heads_first(q), _heads_first(k), _heads_first(v)
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), _empty_lse(q).fill_(-float("inf"))
    if q.device.type not in ("cpu", "cuda"):
        return scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous(), _empty_lse(q)
    forward, _ = _kernels(*heads_first, scale)
    out, lse = forward(*heads_first, scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    known = q.device.type in ("cpu", "cuda")
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]) if known else 0, dtype=dtype)


def _attention_one_by_one(q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = _empty_lse(q[None])[0] if q.device.type in ("cpu", "cuda") else _empty_lse(q[None])
    for tokens, keys in zip(sequences.slices(), sequences.keys.slices(), strict=True):
        one, one_lse = attention(q[None, tokens], k[None, keys], v[None, keys], scale)
        out[tokens] = one[0]
        if lse.dim() == 2:
            lse[:, tokens] = one_lse[0]
    return out, lse


def _backward_one_by_one(grad_out: Tensor, saved: SavedAttention, sequences: Sequences, grads: Heads) -> None:
    for tokens, keys in zip(sequences.slices(), sequences.keys.slices(), strict=True):
        q, out, k, v = saved.q[None, tokens], saved.out[None, tokens], saved.k[None, keys], saved.v[None, keys]
        lse = saved.lse[None, :, tokens] if saved.lse.dim() == 2 else saved.lse
        filled = grads[0][None, tokens], grads[1][None, keys], grads[2][None, keys]
        attention_backward(grad_out[None, tokens], SavedAttention(q, k, v, out, lse, saved.scale, None), filled)


@implements("attention_backward", "sdpa")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, out, lse, scale, _, sequences = saved
    if sequences is not None:
        return _backward_one_by_one(grad_out, saved, sequences, grads)
    if q.numel() == 0 or k.numel() == 0:
        for grad in grads:
            grad.zero_()
        return
    heads_first = _heads_first(q), _heads_first(k), _heads_first(v)
    if lse.numel() == 0:  # a device whose kernels give none
        out, lse = _plain(*heads_first, scale)
        out, backward = out.transpose(1, 2), _plain_backward
    else:
        _, backward = _kernels(*heads_first, scale)
    results = backward(_heads_first(grad_out), *heads_first, out.transpose(1, 2), lse.to(accumulate_dtype(q)), scale)
    for destination, grad in zip(grads, results, strict=True):
        destination.copy_(grad.transpose(1, 2))
