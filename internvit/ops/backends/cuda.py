"""Backend `cuda`: the compiled library `internvit_cuda` (csrc/cuda), and what it leaves to others.

Products are cuBLASLt's, which adds the bias in float32 before its one rounding; the library's GELU follows. Attention
is `qk_norm` in memory (the library's), then the flash-attn package where it is installed and takes the tensors, else
torch's SDPA. Their log-sum-exp has no layout in common, so none is kept: backward runs flash-attn's forward once more,
and with SDPA the plain formula, an image at a time. Compiled and run on the host in tests; no GPU has run it.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from internvit.ops.backends.registry import BACKENDS, implementation, implements, implements_all
from internvit.ops.backends.torch_gemm import epilogue, float8_sums, int8_sums
from internvit.ops.core.attention_math import Heads, QKNorm, SavedAttention, portable
from internvit.ops.core.direct import plain
from internvit.ops.core.raw_fakes import register_fakes
from internvit.ops.core.registration import OPS
from internvit.ops.linear_gelu import linear_then_gelu

implements_all(torch.ops.internvit_cuda, "cuda", OPS)
register_fakes("cuda")
implements("linear_gelu", "cuda")(functools.partial(linear_then_gelu, "cuda"))


def _attention_backend(q: Tensor) -> str:
    flash = BACKENDS["flash"]
    usable = flash.unavailable_reason() is None
    return "flash" if usable and flash.unsupported_reason(q.device.type, q.dtype, q.shape[-1]) is None else "sdpa"


@implements("attention", "cuda")
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None = None) -> tuple[Tensor, Tensor]:
    if plain([q]):
        out, _ = implementation("attention", _attention_backend(q))(q, k, v, scale, None)
    else:  # of a program that is made for a process without Python, which has no flash-attn and chooses when it runs
        out = portable(q, k, v, scale).contiguous()
    return out, q.new_empty(0, dtype=torch.float32)


@implements("attention_backward", "cuda")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, _, _, scale, *_ = saved
    name = _attention_backend(q)
    if BACKENDS[name].exposes_lse_on(q.device.type):
        out, lse = implementation("attention", name)(q, k, v, scale, None)
        saved = saved._replace(out=out, lse=lse)
    implementation("attention_backward", name)(grad_out, saved, grads)


@implements("linear_int8", "cuda")
def linear_int8(x_q: Tensor, x_scale: Tensor, weight_q: Tensor, *others: Any) -> Tensor:
    return epilogue(int8_sums(x_q, weight_q), x_scale, weight_q, *others)


@implements("linear_fp8", "cuda")
def linear_fp8(
    x_q: Tensor, x_scale: Tensor, weight_q: Tensor, weight_scale: Tensor, bias: Tensor | None, *others: Any
) -> Tensor:
    return epilogue(float8_sums(x_q, weight_q), x_scale, weight_q, weight_scale, bias, None, *others)
