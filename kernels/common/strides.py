"""Strides as kernels take them: in units that tell Triton how they are aligned."""

import functools
import operator

import triton
import triton.language as tl
from torch import Tensor


def stride_unit(*strides: int) -> int:
    """The number of elements that strides are passed in: 8 where all divide by 8 and one does not by 16, else 1.

    Triton knows of an integer argument that 16 divides it, or nothing: of heads 72 elements apart 2-byte loads would be
    made. Passed as 9 and multiplied by 8 in the kernel, the loads are 16 bytes wide.
    """
    return 8 if functools.reduce(operator.or_, strides, 0) % 16 == 8 else 1


def in_units(strides: list[int]) -> tuple[list[int], int]:
    """Strides in units of `stride_unit`, and that unit."""
    unit = stride_unit(*strides)
    return strides if unit == 1 else [s // unit for s in strides], unit


def row_strides(*tensors: Tensor | None) -> tuple[list[int], int]:
    """The stride between rows of each tensor, contiguous or [M, C], 0 for None, in units."""
    return in_units([0 if t is None else t.shape[-1] if t.is_contiguous() else t.stride(0) for t in tensors])


def head_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of images, tokens and heads of each tensor [B, N, H, D], in units."""
    return in_units([s for t in tensors for s in t.stride()[:3]])


def token_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """As `head_strides` of packs [1, total, H, D], where a kernel finds a sequence by its first token: the stride of
    tokens is that of images too."""
    return in_units([t.stride(dim) for t in tensors for dim in (1, 1, 2)])


@triton.jit
def in_elements(stride, STRIDE_UNIT: tl.constexpr):
    """A stride passed in units of STRIDE_UNIT elements; int64 where it has to be multiplied (`stride_unit`)."""
    if STRIDE_UNIT == 1:
        elements = stride
    else:
        elements = tl.cast(stride, tl.int64) * STRIDE_UNIT
    return elements
