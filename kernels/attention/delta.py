"""The first pass of attention's backward: delta, and with QK-norm the folded queries.

    delta_i = sum_d dO_id O_id,  q~ = q * rstd_q * q_weight * k_weight * scale * log2(e)

Formulas of the whole backward are explained in `backward.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.attention.config import AttentionConfig, QKNorm, head_blocks
from internvit.kernels.attention.scores import LOG2E, fold
from internvit.kernels.attention.tiles import load_rows, one_head, store_rows
from internvit.kernels.common import launch
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.strides import head_strides


@triton.jit
def attention_delta_kernel(
    p_grad_out, p_out, p_q,  # [B, N, H, D]
    p_q_weight, p_k_weight,  # [H * D] or None
    p_rstd_q,  # [B, N] or None
    p_delta,  # [B, H, N]
    p_folded,  # [B, N, H, D], grad_q's memory
    N, H,
    stride_gb, stride_gn, stride_gh,
    stride_ob, stride_on, stride_oh,
    stride_qb, stride_qn, stride_qh,
    stride_fb, stride_fn, stride_fh,
    scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(N, BLOCK_M)
    i_bh = (tl.program_id(0) // tiles).to(tl.int64)
    i_b, i_h = i_bh // H, i_bh % H
    i_m = tl.program_id(0) % tiles * BLOCK_M
    o_m = i_m + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    o_d = tl.arange(0, BLOCK_D)  # [BLOCK_D]
    p_grad_out, stride_gn = one_head(p_grad_out, i_b, i_h, stride_gb, stride_gn, stride_gh, STRIDE_UNIT)
    p_out, stride_on = one_head(p_out, i_b, i_h, stride_ob, stride_on, stride_oh, STRIDE_UNIT)
    b_grad = load_rows(p_grad_out, i_m, N, stride_gn, o_d, D, BLOCK_M, True)
    b_out = load_rows(p_out, i_m, N, stride_on, o_d, D, BLOCK_M, True)
    b_delta = tl.sum(b_grad.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + i_bh * N + o_m, b_delta, mask=o_m < N)
    if p_rstd_q is not None:
        p_q, stride_qn = one_head(p_q, i_b, i_h, stride_qb, stride_qn, stride_qh, STRIDE_UNIT)
        p_folded, stride_fn = one_head(p_folded, i_b, i_h, stride_fb, stride_fn, stride_fh, STRIDE_UNIT)
        b_q = load_rows(p_q, i_m, N, stride_qn, o_d, D, BLOCK_M, True)
        b_rstd = tl.load(p_rstd_q + i_b * N + o_m, mask=o_m < N, other=0.0)
        b_folded = fold(b_q, p_q_weight, p_k_weight, b_rstd, i_h, o_d, scale_log2, D)
        store_rows(p_folded, i_m, N, stride_fn, o_d, D, BLOCK_M, b_folded)


def delta(
    config: AttentionConfig, grad_out: Tensor, out: Tensor, q: Tensor, norm: QKNorm, folded: Tensor, scale: float
) -> Tensor:
    """delta [B, H, N]; with QK-norm `folded` [B, N, H, D] is filled with q~."""
    B, N, H, D = q.shape
    delta = q.new_empty((B, H, N), dtype=torch.float32)
    strides, unit = head_strides(grad_out, out, q, folded)
    launch.run(
        attention_delta_kernel,
        (cdiv(N, config.rows) * B * H,),
        *(grad_out, out, q, norm.q_weight, norm.k_weight, norm.rstd_q, delta, folded, N, H),
        *(*strides, scale * LOG2E.value),
        **head_blocks(D),
        STRIDE_UNIT=unit,
        BLOCK_M=config.rows,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return delta
