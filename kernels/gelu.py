"""The first half of the MLP on a GPU: torch's GEMM with the bias in its epilogue, and one pass of exact GELU.

    y = gelu(pre_activation),  gelu(z) = z / 2 * (1 + erf(z / sqrt(2)))              reads 1, writes 1
    grad = grad_y * (cdf(z) + z * pdf(z))                                            reads 2, writes 1

The bias belongs to the GEMM, whose epilogue adds it in registers (torch's addmm). In tensors [N, M] moved, the GEMM's
output included: forward 3 (z written and read, y written), backward 3. With the bias in this pass instead it is 3 and 3
as well if backward adds it again to the saved product, and 4 and 3 if the pass writes z for it: it saves nothing. And
the product would be rounded to 16 bit before the bias instead of after: z, which rematerialization and other backends
share, would be nowhere, or rounded twice, sqrt(2) times the error that the contract allows.
"""

import functools
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import config as configs
from internvit.kernels.common import launch
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.target import Target


@dataclass(frozen=True)
class GeluConfig:
    """Attributes:
    block: elements of a program, 8 a thread: one 16-byte load in bf16.
    warps: warps of a program.
    """

    block: int = 1024
    warps: int = 4


@triton.jit
def normal_cdf(b_z):
    """(1 + erf(z / sqrt(2))) / 2: libdevice's two polynomials of erf with the factors folded into their coefficients.

    Both are evaluated, one is taken, and constants are operands of the multiply-adds. `tl.erf` selects coefficients
    instead, two moves for each of the seven: gelu took 291 instructions for 8 elements on sm_90 and its backward 381,
    here 201 and 252 (sm_80: 289 and 378, 202 and 251; sm_100: 283 and 353, 169 and 212). The negative tail keeps its
    digits, which 1 + erf loses: at z = -5 the cdf was off by 5 % of itself, here by 6e-4.
    """
    b_size = tl.abs(b_z)
    b_log2 = b_size * -1.4518533362206654e-06 + 5.850263187312521e-05
    b_log2 = b_log2 * b_size - 0.0009306875872425735
    b_log2 = b_log2 * b_size + 0.008575769141316414
    b_log2 = b_log2 * b_size - 0.054197508841753006
    b_log2 = b_log2 * b_size - 0.4581565260887146
    b_log2 = b_log2 * b_size - 1.1513818502426147
    b_tail = tl.exp2(b_log2 * b_size - 1.0)  # cdf(-|z|)
    b_square = b_z * b_z
    b_slope = b_square * 4.686512795615272e-07 - 9.074269655684475e-06
    b_slope = b_slope * b_square + 0.0001152029144577682
    b_slope = b_slope * b_square - 0.0011874432675540447
    b_slope = b_slope * b_square + 0.009973745793104172
    b_slope = b_slope * b_square - 0.06649042665958405
    b_slope = b_slope * b_square + 0.3989422619342804
    return tl.where(b_size < 1.4183, b_slope * b_z + 0.5, tl.where(b_z < 0, b_tail, 1.0 - b_tail))


@triton.jit
def exact_gelu(b_z):
    """GELU of float32 z; also the epilogue of `linear`, where the same z gives the same bits."""
    return b_z * normal_cdf(b_z)


@triton.jit
def gelu_kernel(p_z, p_y, count, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_z = tl.load(p_z + o, mask=o < count, other=0.0).to(tl.float32)
    tl.store(p_y + o, exact_gelu(b_z).to(p_y.dtype.element_ty), mask=o < count)


@triton.jit
def gelu_backward_kernel(p_grad_y, p_z, p_grad, count, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    b_z = tl.load(p_z + o, mask=o < count, other=0.0).to(tl.float32)
    b_grad_y = tl.load(p_grad_y + o, mask=o < count, other=0.0).to(tl.float32)
    b_pdf = 0.3989422804014327 * tl.exp2(b_z * b_z * -0.7213475204444817)
    tl.store(p_grad + o, (b_grad_y * (normal_cdf(b_z) + b_z * b_pdf)).to(p_grad.dtype.element_ty), mask=o < count)


def elementwise(config: GeluConfig, kernel: Any, *tensors: Tensor) -> None:
    count = tensors[0].numel()
    launch.run(kernel, (cdiv(count, config.block),), *tensors, count, BLOCK=config.block, num_warps=config.warps)


@functools.cache
def gelu_config(kernel: str, target: Target) -> GeluConfig:
    return configs.choose(GeluConfig, kernel, "", target, GeluConfig)


def gelu(pre_activation: Tensor) -> Tensor:
    y = pre_activation.new_empty(pre_activation.shape)
    config = gelu_config("gelu", launch.target_of(y))
    configs.call("gelu", "", config, elementwise, gelu_kernel, pre_activation.contiguous(), y)
    return y


def gelu_backward(grad_y: Tensor, pre_activation: Tensor) -> Tensor:
    grad = grad_y.new_empty(grad_y.shape)
    config = gelu_config("gelu_backward", launch.target_of(grad))
    inputs = grad_y.contiguous(), pre_activation.contiguous()
    configs.call("gelu_backward", "", config, elementwise, gelu_backward_kernel, *inputs, grad)
    return grad
