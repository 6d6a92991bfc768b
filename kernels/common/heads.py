"""Tensors [B, N, H, D] by their strides: what QK-norm and attention share."""

import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common.rows import stride_unit


@triton.jit
def head_offsets(o_rows, N, stride_b, stride_n, stride_h, o_cols, D: tl.constexpr, ADJACENT: tl.constexpr):
    """Offsets [ROWS, BLOCK_C] of tokens o_rows and columns h * D + d; ADJACENT: heads lie side by side."""
    o_token = (o_rows // N) * stride_b + (o_rows % N) * stride_n
    if ADJACENT:
        o = o_token[:, None] + o_cols[None, :]
    else:
        o = o_token[:, None] + ((o_cols // D).to(tl.int64) * stride_h + o_cols % D)[None, :]
    return o


@triton.jit
def load_heads(p_x, o_rows, N, stride_b, stride_n, stride_h, o_cols, m_tile, D: tl.constexpr, ADJACENT: tl.constexpr):
    o = head_offsets(o_rows, N, stride_b, stride_n, stride_h, o_cols, D, ADJACENT)
    return tl.load(p_x + o, mask=m_tile, other=0.0).to(tl.float32)


def head_strides(*tensors: Tensor) -> tuple[list[int], int]:
    """The strides of images, tokens and heads of each tensor in units of `stride_unit`, and that unit."""
    strides = [t.stride(i) for t in tensors for i in range(3)]
    unit = stride_unit(*strides)
    return [s // unit for s in strides], unit


def heads_adjacent(*tensors: Tensor) -> bool:
    return all(t.stride(2) == t.shape[3] or t.shape[2] == 1 for t in tensors)


def dense_heads(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 128 tokens within an int32 offset, a copy only where it is not so."""
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(1) < 2**24 else x.contiguous()
