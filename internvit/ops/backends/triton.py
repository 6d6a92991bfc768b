"""Backend `triton`: the kernels of `internvit.kernels`, whose functions have the ops' names and signatures."""

import functools
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from internvit import kernels
from internvit.kernels.attention.backward import attention_backward as attention_backward_kernels
from internvit.kernels.attention.column_sums import attention_column_sums as attention_column_sums_kernels
from internvit.kernels.attention.forward import attention as attention_kernels
from internvit.kernels.linear import Quantized, scale_sums
from internvit.ops.backends.registry import implements
from internvit.ops.backends.torch_gemm import float8_sums, int8_sums
from internvit.ops.core.attention_math import Heads, QKNorm, QKNormGrads, SavedAttention
from internvit.ops.core.registration import OPS
from internvit.ops.core.sequences import Sequences
from internvit.ops.linear_gelu import linear_then_gelu

_NO_QK_NORM: tuple[Any, ...] = (None, None, None, None)

for _found in iter_modules(kernels.__path__, f"{kernels.__name__}."):
    if not _found.ispkg:
        _module = import_module(_found.name)
        for _name in OPS.keys() & vars(_module).keys():
            implements(_name, "triton")(getattr(_module, _name))


implements("linear_gelu", "triton")(functools.partial(linear_then_gelu, "triton"))


@implements("attention", "triton")
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    return attention_kernels(q, k, v, scale, *(qk_norm or _NO_QK_NORM), *(sequences or ()))


@implements("attention_backward", "triton")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> QKNormGrads | None:
    q, k, v, out, lse, scale, qk_norm, sequences = saved
    inside: tuple[Any, ...] = qk_norm or _NO_QK_NORM
    given = (*inside, *grads, *(sequences or ()))
    outputs: Any = attention_backward_kernels(grad_out, q, k, v, out, lse, scale, *given)
    return None if qk_norm is None else QKNormGrads(*outputs)


@implements("attention_column_sums", "triton")
def attention_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, qk_norm: QKNorm | None, sequences: Sequences | None
) -> Tensor:
    return attention_column_sums_kernels(
        q, k, lse, scale, *(qk_norm or _NO_QK_NORM), *(sequences[:2] if sequences else ())
    )


def _scaled_sums(sums: Callable[[Tensor, Tensor], Tensor], *args: Any) -> Tensor:
    """A quantised Linear by torch's GEMM and an epilogue; the arguments are those of `linear_int8`."""
    x_q, x_scale, weight_q, weight_scale, bias, x_zero, residual, gelu, dtype = args
    quantized = Quantized.of(x_scale, weight_scale, x_zero, weight_q, dtype)
    y = scale_sums(sums(x_q, weight_q), quantized, bias, residual, gelu)
    return y.view(*x_scale.shape, weight_q.shape[0])


implements("linear_int8", "triton")(functools.partial(_scaled_sums, int8_sums))


@implements("linear_fp8", "triton")
def linear_fp8(*args: Any) -> Tensor:
    *operands, residual, gelu, dtype = args
    return _scaled_sums(float8_sums, *operands, None, residual, gelu, dtype)
