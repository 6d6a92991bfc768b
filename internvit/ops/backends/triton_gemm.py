"""Backend `triton_gemm`: the block's GEMMs as Triton kernels with an epilogue, beside the kernels of `triton`.

fc1 with bias and GELU; proj and fc2 with LayerScale and, without gradients, the residual stream; the same of int8 and
float8 operands. Every other op runs on `triton`. Not under `auto`: no GPU has timed it beside cuBLASLt.

Backward leaves its products to PyTorch. GELU's derivative is a pass before them (reads 2, writes 1): inside the product
for x it would be computed again for each column tile of grad_x, 8 times at C = 1024 and 25 times at 3200, 48
instructions an element.
"""

from typing import Any

from torch import Tensor

from internvit.kernels import norm_linear as normed
from internvit.kernels.linear import Quantized, linear
from internvit.ops.backends.registry import implementation, implements
from internvit.ops.linear_layer_scale import linear_layer_scale_backward_reference

for _name in ("gelu", "gelu_backward"):
    implements(_name, "triton_gemm")(implementation(_name, "triton"))


@implements("linear_gelu", "triton_gemm")
def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, save_pre_activation: bool
) -> tuple[Tensor, Tensor | None]:
    return linear("linear_gelu", x, weight, bias, gelu=True, save_pre_activation=save_pre_activation)


@implements("linear_layer_scale", "triton_gemm")
def linear_layer_scale(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, residual: Tensor | None
) -> Tensor:
    return linear("linear_layer_scale", x, weight.to(x.dtype), bias, gamma, residual)[0]


implements("norm_linear", "triton_gemm")(normed.multiply_normed)
implements("linear_residual_stats", "triton_gemm")(normed.add_with_statistics)


@implements("norm_qkv", "triton_gemm")
def norm_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_sum: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    made = normed.project_qkv(x, weight, bias, rstd, mean, weight_sum, eps)
    if made is not None:
        return made
    qkv = normed.multiply_normed(x, weight, bias, rstd, mean, weight_sum, False)
    heads = qkv.view(1, -1, 3, 1, qkv.shape[-1] // 3)
    rstd_q, rstd_k = implementation("qk_norm_stats", "triton")(heads[:, :, 0], heads[:, :, 1], eps)
    return qkv, rstd_q.view(x.shape[:-1]), rstd_k.view(x.shape[:-1])


@implements("linear_int8", "triton_gemm")
def linear_int8(*args: Any) -> Tensor:
    return _quantized_linear("linear_int8", *args)


@implements("linear_fp8", "triton_gemm")
def linear_fp8(*args: Any) -> Tensor:
    *operands, residual, gelu, dtype = args
    return _quantized_linear("linear_fp8", *operands, None, residual, gelu, dtype)


def _quantized_linear(op: str, *args: Any) -> Tensor:
    """The arguments are those of `linear_int8`."""
    x_q, x_scale, weight_q, weight_scale, bias, x_zero, residual, gelu, dtype = args
    quantized = Quantized.of(x_scale, weight_scale, x_zero, weight_q, dtype)
    return linear(op, x_q, weight_q, bias, None, residual, gelu, quantized=quantized)[0]


@implements("linear_layer_scale_backward", "triton_gemm")
def linear_layer_scale_backward(*args: Any) -> tuple[Tensor | None, ...]:
    """The reference's, but gamma multiplies the gradient: gamma * weight may leave float16's normal range."""
    grad_y, _, weight, _, gamma, x_dtype, output_mask = args
    _, *grads = linear_layer_scale_backward_reference(*args[:-1], (False, *output_mask[1:]))
    grad_x = (grad_y * gamma).to(x_dtype) @ weight.to(x_dtype) if output_mask[0] else None
    return grad_x, *grads
