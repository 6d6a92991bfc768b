"""Tensors [B, N, H, D] by their strides: what QK-norm and attention share."""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import launch
from internvit.kernels.common.rows import RowConfig
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.strides import head_strides, in_elements


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


def run_heads(
    kernel: Any,
    config: RowConfig,
    pointers: Sequence[Tensor],
    strided: Sequence[Tensor],
    *scalars: float,
    **constants: Any,
) -> None:
    """Starts `kernel`, whose rows are tokens of C = H * D channels.

    Args:
        pointers: the kernel's first arguments.
        strided: those of them that are read and written by strides, each [B, N, H, D].
        scalars: the kernel's last arguments.
    """
    B, N, H, D = strided[0].shape
    strides, unit = head_strides(*strided)
    launch.run(
        kernel,
        (cdiv(B * N, config.rows),),
        *(*pointers, B * N, N, *strides, *scalars),
        D=D,
        STRIDE_UNIT=unit,
        ADJACENT=all(t.stride(2) == D or H == 1 for t in strided),
        **config.constants(H * D),
        **constants,
    )


def dense_heads(x: Tensor) -> Tensor:
    """x with its last dimension contiguous and 128 tokens within an int32 offset, a copy only where it is not so."""
    _, stride_n, _, stride_d = x.stride()
    return x if (stride_d == 1 or x.shape[3] == 1) and stride_n < 2**24 else x.contiguous()
