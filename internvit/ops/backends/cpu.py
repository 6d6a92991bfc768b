"""Backend `cpu`: the compiled library `internvit_cpu` (csrc/cpu), with `internvit.ops.linear` before its GELU."""

import functools
from typing import Any

import torch
from torch import Tensor

from internvit.ops.backends.registry import implements, implements_all
from internvit.ops.core.attention_math import Heads, QKNorm, QKNormGrads, SavedAttention
from internvit.ops.core.raw_fakes import register_fakes
from internvit.ops.core.registration import OPS
from internvit.ops.core.sequences import Sequences
from internvit.ops.linear_gelu import linear_then_gelu

_NO_QK_NORM = (None, None, None, None)

implements_all(torch.ops.internvit_cpu, "cpu", OPS)
register_fakes("cpu")
implements("linear_gelu", "cpu")(functools.partial(linear_then_gelu, "cpu"))


@implements("attention", "cpu")
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    return torch.ops.internvit_cpu.attention.default(q, k, v, scale, *(qk_norm or _NO_QK_NORM), *_ends(sequences))


def _ends(sequences: Sequences | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if sequences is None else (sequences.cu_seqlens, sequences.cu_seqlens_k)


@implements("attention_backward", "cpu")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> QKNormGrads | None:
    *kept, qk_norm, sequences = saved
    backward = torch.ops.internvit_cpu.attention_backward.default
    outputs = backward(grad_out, *kept, *(qk_norm or _NO_QK_NORM), *grads, *_ends(sequences))
    return None if qk_norm is None else QKNormGrads(*outputs)


@implements("attention_column_sums", "cpu")
def attention_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, qk_norm: QKNorm | None, sequences: Sequences | None
) -> Tensor:
    ends = None if sequences is None else sequences.cu_seqlens
    return torch.ops.internvit_cpu.attention_column_sums.default(q, k, lse, scale, *(qk_norm or _NO_QK_NORM), ends)


def _multiplies_int8() -> bool:
    """Asked outside of a trace: torch.jit.trace records ops, and knows none that returns a bool."""
    trace = torch._C._get_tracing_state()
    if trace is None:  # setting it is an error where the dispatcher has left tracing behind, as in a fake op
        return torch.ops.internvit_cpu.multiplies_int8()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        return torch.ops.internvit_cpu.multiplies_int8()
    finally:
        torch._C._set_tracing_state(trace)  # type: ignore[attr-defined]


if _multiplies_int8():

    @implements("linear_int8", "cpu")
    def linear_int8(x_q: Tensor, x_scale: Tensor, weight_q: Tensor, *others: Any) -> Tensor:
        packed = torch.ops.internvit_cpu.pack_weight_int8.default(weight_q)
        return torch.ops.internvit_cpu.linear_int8_packed.default(x_q, x_scale, packed, *others)
