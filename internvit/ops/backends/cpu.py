"""Backend `cpu`: the compiled library `internvit_cpu` (csrc/cpu), with PyTorch's Linear before its GELU."""

import functools

import torch
from torch import Tensor

from internvit.ops.attention import Heads, QKNorm, QKNormGrads, SavedAttention
from internvit.ops.backends.registry import implements, implements_all
from internvit.ops.core.raw_fakes import register_fakes
from internvit.ops.core.registration import OPS
from internvit.ops.linear_gelu import linear_then_gelu

_NO_QK_NORM = (None, None, None, None)

implements_all(torch.ops.internvit_cpu, "cpu", OPS)
register_fakes("cpu")
implements("linear_gelu", "cpu")(functools.partial(linear_then_gelu, "cpu"))


@implements("attention", "cpu")
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None) -> tuple[Tensor, Tensor]:
    return torch.ops.internvit_cpu.attention.default(q, k, v, scale, *(qk_norm or _NO_QK_NORM))


@implements("attention_backward", "cpu")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> QKNormGrads | None:
    *kept, qk_norm = saved
    outputs = torch.ops.internvit_cpu.attention_backward.default(grad_out, *kept, *(qk_norm or _NO_QK_NORM), *grads)
    return None if qk_norm is None else QKNormGrads(*outputs)
