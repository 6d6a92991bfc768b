"""Tensors [B, N, H, D] by their strides: what QK-norm and attention share."""

import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common.rows import RowConfig
from internvit.kernels.common.strides import in_elements


@triton.jit
def head_offsets(
    o_rows, N, stride_b, stride_n, stride_h, o_cols, D: tl.constexpr, STRIDE_UNIT: tl.constexpr, ADJACENT: tl.constexpr
):
    """Offsets [ROWS, BLOCK_C] of tokens o_rows and columns h * D + d; ADJACENT: heads lie side by side."""
    stride_b, stride_n = in_elements(stride_b, STRIDE_UNIT), in_elements(stride_n, STRIDE_UNIT)
    o_token = (o_rows // N) * stride_b + (o_rows % N) * stride_n
    if ADJACENT:
        o = o_token[:, None] + o_cols[None, :]
    else:
        o = o_token[:, None] + ((o_cols // D).to(tl.int64) * in_elements(stride_h, STRIDE_UNIT) + o_cols % D)[None, :]
    return o


@triton.jit
def load_heads(
    p_x, o_rows, N, stride_b, stride_n, stride_h, o_cols, m_tile,
    D: tl.constexpr, STRIDE_UNIT: tl.constexpr, ADJACENT: tl.constexpr,
):  # fmt: skip
    o = head_offsets(o_rows, N, stride_b, stride_n, stride_h, o_cols, D, STRIDE_UNIT, ADJACENT)
    return tl.load(p_x + o, mask=m_tile, other=0.0).to(tl.float32)


def head_constants(config: RowConfig, *tensors: Tensor) -> dict[str, int]:
    """The constants of a kernel whose rows are the tokens of tensors [B, N, H, D]."""
    _, _, H, D = tensors[0].shape
    adjacent = all(t.stride(2) == D or H == 1 for t in tensors)
    return {"D": D, "ADJACENT": adjacent, **config.constants(H * D)}


def dense_heads(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 128 tokens within an int32 offset, a copy only where it is not so."""
    return x if (x.stride(3) == 1 or x.shape[3] == 1) and x.stride(1) < 2**24 else x.contiguous()
