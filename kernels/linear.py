"""A Linear with its epilogue: bias, then exact GELU, or LayerScale and the residual stream, in one GEMM.

    y = gelu(z),  z = x weight^T + bias                        z is written too where backward needs it
    y = residual + gamma * (x weight^T + bias)
    y = z,  gelu(z)  or  residual + z                          of int8 or float8 operands,
        z = x_scale * weight_scale * ((x - x_zero) weight^T) + bias

Products accumulate in float32, the epilogue is float32, and each output is rounded once; GELU is taken of z as rounded,
so that `gelu` rebuilds y from z to the bit. Beside torch's GEMM and a pass of its own, the epilogue saves reading and
writing y's size once with GELU, and once with the residual.

One program computes one tile of y. A row's products are added in the same order wherever the row stands, and tiles are
never chosen by the number of rows: a row's result does not depend on its batch. float32 products are exact ("ieee").
Sums of int8 products are exact (int32); those of float8 leave the tensor core, which keeps 14 bits of them on Hopper,
every BLOCK_K terms. Beside torch's GEMM of the same operands, which leaves the sums in memory in 32 bits, the epilogue
saves writing and reading those: 8 of the 10 bytes of each output.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from internvit.kernels.common import config as configs
from internvit.kernels.common import launch
from internvit.kernels.common.rows import as_rows, contiguous
from internvit.kernels.common.sizes import cdiv
from internvit.kernels.common.target import Target
from internvit.kernels.gelu import exact_gelu

MAX_STRIDE = 1 << 24
"""Elements from row to row: offsets inside a tile are int32, 127 rows of these at most."""


@dataclass(frozen=True)
class LinearConfig:
    """Attributes:
    rows, columns: of a program's tile of y.
    depth: columns of x and weight that an iteration multiplies.
    warps: warps of a program.
    stages: loads in flight.
    group: row tiles that programs walk down before the next column tile, so that both operands come from L2.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    group: int = 8

    def constants(self) -> dict[str, int]:
        tile = {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth, "GROUP": self.group}
        return tile | {"num_warps": self.warps, "num_stages": self.stages}

    @classmethod
    def rule(cls, K: int, N: int, itemsize: int, target: Target, promotes: bool = False) -> "LinearConfig":
        """Tiles of which two programs fit a multiprocessor, so that one's epilogue runs during the other's products.

        The epilogue with GELU issues 5500 cycles of instructions for a tile of 128 x 128 on sm_90, whose products take
        the tensor cores 8192 cycles at K = 1024: not overlapped, two thirds as long again. Two programs need at most
        128 registers a thread with 8 warps, and half the shared memory each; stages are what that half holds.

        Rows of K or N elements that 16 does not divide are loaded and stored 2 bytes at a time, through eight times the
        pointers: tiles of 128 x 128 spill then, of 64 x 64 not.

        Sums that are promoted from the tensor core's to float32 ones take twice the registers, 175 a thread for 128
        columns on sm_90: they get 64 columns.
        """
        if itemsize == 4:
            return cls._float32(target)
        if itemsize == 1:
            config = cls.rule(K, N, 2, target)
            depth = 2 * config.depth  # as many bytes
            return dataclasses.replace(config, depth=depth, columns=64 if promotes else config.columns)
        if K % 16 or N % 16:
            return cls(64, 64, 32, 256 // target.warp_size, 2)
        depth = 64 if target.matrix_instructions in ("wgmma", "tcgen05", "mfma") else 32
        config = cls(128, 128, depth, 256 // target.warp_size, 4)
        if target.is_amd:
            return dataclasses.replace(config, stages=2)
        while config.stages > 2 and 2 * config.shared_bytes(itemsize) > target.shared_bytes:
            config = dataclasses.replace(config, stages=config.stages - 1)
        return config

    @classmethod
    def _float32(cls, target: Target) -> "LinearConfig":
        """Without tensor cores, but for mfma."""
        if target.matrix_instructions == "mfma":
            return cls(128, 64, 16, 4, 2)
        return cls(64, 64, 16, 8, 2)

    def shared_bytes(self, itemsize: int) -> int:
        """Shared memory of the tiles in flight."""
        return self.stages * (self.rows + self.columns) * self.depth * itemsize


@triton.jit
def tile_of_program(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column tile of this program: down GROUP row tiles, then on to the next column tile."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    programs = GROUP * tl.cdiv(N, BLOCK_N)  # of a group
    i_first = tl.program_id(0) // programs * GROUP
    rows = tl.minimum(tiles_m - i_first, GROUP)
    i_in_group = tl.program_id(0) % programs
    return i_first + i_in_group % rows, i_in_group // rows


@triton.jit
def tile_pointers(p_x, i_tile, stride, o_cols, ROWS: tl.constexpr):
    """Pointers [ROWS, COLUMNS] to row tile i_tile; int64 between tiles, int32 inside one."""
    o_tile = tl.arange(0, ROWS)[:, None] * stride + o_cols[None, :]
    return p_x + tl.cast(i_tile, tl.int64) * ROWS * stride + o_tile


@triton.jit
def halves(b_x):
    """The left and the right columns [ROWS, COLUMNS / 2] of a tile [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(b_x, [b_x.shape[0], 2, b_x.shape[1] // 2]), (0, 2, 1)))


@triton.jit
def finish(
    b_y,  # [BLOCK_M, BLOCK_N] float32 or int32, products
    p_x_scale,
    p_weight_scale,
    p_x_zero,
    p_weight_sum,
    p_bias,
    p_gamma,
    p_residual,
    p_z,
    p_y,
    i_m,
    i_n,
    M,
    N,
    stride_residual,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue of tile (i_m, i_n), and its stores."""
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_n = o_n < N
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_y = (o_m < M)[:, None] & m_n[None, :]  # [BLOCK_M, BLOCK_N]
    if p_x_zero is not None:
        b_zero = tl.load(p_x_zero + o_m, mask=o_m < M, other=0)
        b_y -= b_zero[:, None] * tl.load(p_weight_sum + o_n, mask=m_n, other=0)[None, :]
    if p_x_scale is not None:
        b_scale = tl.load(p_x_scale + o_m, mask=o_m < M, other=0.0)
        b_weight_scale = tl.load(p_weight_scale + o_n, mask=m_n, other=0.0)
        b_y = b_y.to(tl.float32) * b_scale[:, None] * b_weight_scale[None, :]
    if p_bias is not None:
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if GELU and p_x_scale is not None:
        b_y = exact_gelu(b_y)
    elif GELU:
        b_z = b_y.to(p_y.dtype.element_ty)
        if p_z is not None:
            tl.store(tile_pointers(p_z, i_m, N, o_n, BLOCK_M), b_z, mask=m_y)
        b_y = exact_gelu(b_z.to(tl.float32))
    if p_gamma is not None:
        b_y *= tl.load(p_gamma + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if p_residual is not None:
        p_r = tile_pointers(p_residual, i_m, stride_residual, o_n, BLOCK_M)
        b_y += tl.load(p_r, mask=m_y, other=0.0).to(tl.float32)
    tl.store(tile_pointers(p_y, i_m, N, o_n, BLOCK_M), b_y.to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def products(
    p_x, p_weight, i_m, i_n, M, N, K, stride_x, stride_weight,
    WHOLE_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Tile (i_m, i_n) of x weight^T, [BLOCK_M, BLOCK_N] float32, int32 of int8 operands."""
    o_k = tl.arange(0, BLOCK_K)  # [BLOCK_K]
    m_a = (i_m * BLOCK_M + tl.arange(0, BLOCK_M) < M)[:, None]
    m_b = (i_n * BLOCK_N + tl.arange(0, BLOCK_N) < N)[:, None]
    p_a = tile_pointers(p_x, i_m, stride_x, o_k, BLOCK_M)
    p_b = tile_pointers(p_weight, i_n, stride_weight, o_k, BLOCK_N)
    is_int8: tl.constexpr = p_x.dtype.element_ty == tl.int8
    is_float8: tl.constexpr = p_x.dtype.element_ty == tl.float8e4nv
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if is_int8 else tl.float32)
    for i_k in range(0, K, BLOCK_K):
        if WHOLE_K:
            b_a = tl.load(p_a + i_k, mask=m_a, other=0.0)  # [BLOCK_M, BLOCK_K]
            b_b = tl.load(p_b + i_k, mask=m_b, other=0.0)  # [BLOCK_N, BLOCK_K]
        else:
            m_k = (o_k < K - i_k)[None, :]
            b_a = tl.load(p_a + i_k, mask=m_a & m_k, other=0.0)
            b_b = tl.load(p_b + i_k, mask=m_b & m_k, other=0.0)
        if is_int8:
            b_y = tl.dot(b_a, tl.trans(b_b), b_y, out_dtype=tl.int32)
        elif is_float8:
            b_y = tl.dot(b_a, tl.trans(b_b), b_y, max_num_imprecise_acc=BLOCK_K)
        else:
            b_y = tl.dot(b_a, tl.trans(b_b), b_y, input_precision="ieee")
    return b_y


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    p_x,  # [M, K]
    p_weight,  # [N, K]
    p_x_scale,  # [M] or None
    p_weight_scale,  # [N] or None
    p_x_zero,  # [M] int32 or None
    p_weight_sum,  # [N] int32 or None, of weight over K
    p_bias,  # [N] or None
    p_gamma,  # [N] or None
    p_residual,  # [M, N] or None
    p_z,  # [M, N] or None, what GELU is taken of
    p_y,  # [M, N]
    M,
    N,
    K,
    stride_x,
    stride_weight,
    stride_residual,
    GELU: tl.constexpr,
    WHOLE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    i_m, i_n = tile_of_program(M, N, BLOCK_M, BLOCK_N, GROUP)
    b_y = products(p_x, p_weight, i_m, i_n, M, N, K, stride_x, stride_weight, WHOLE_K, BLOCK_M, BLOCK_N, BLOCK_K)
    # One half after the other: the whole tile's epilogue holds 155 to 184 registers a thread (sm_90), a half's at most
    # 128, of which two programs share a multiprocessor.
    b_left, b_right = halves(b_y)
    tensors = (p_x_scale, p_weight_scale, p_x_zero, p_weight_sum, p_bias, p_gamma, p_residual, p_z, p_y)
    finish(b_left, *tensors, i_m, 2 * i_n, M, N, stride_residual, GELU, BLOCK_M, BLOCK_N // 2)
    finish(b_right, *tensors, i_m, 2 * i_n + 1, M, N, stride_residual, GELU, BLOCK_M, BLOCK_N // 2)


@triton.jit(do_not_specialize=["M"])
def epilogue_kernel(
    p_sums,  # [M, N] float32 or int32
    p_x_scale,  # [M]
    p_weight_scale,  # [N]
    p_x_zero,  # [M] int32 or None
    p_weight_sum,  # [N] int32 or None
    p_bias,  # [N] or None
    p_residual,  # [M, N] or None
    p_y,  # [M, N]
    M,
    N,
    stride_residual,
    GELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The epilogue alone, of sums that another GEMM left in memory."""
    i_m, i_n = tl.program_id(0), tl.program_id(1)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    m_sums = (i_m * BLOCK_M + tl.arange(0, BLOCK_M) < M)[:, None] & (o_n < N)[None, :]
    b_sums = tl.load(tile_pointers(p_sums, i_m, N, o_n, BLOCK_M), mask=m_sums, other=0)
    tensors = (p_x_scale, p_weight_scale, p_x_zero, p_weight_sum, p_bias, None, p_residual, None, p_y)
    finish(b_sums, *tensors, i_m, i_n, M, N, stride_residual, GELU, BLOCK_M, BLOCK_N)


@dataclass(frozen=True)
class Quantized:
    """What a product of int8 or float8 operands is multiplied by, and the dtype of y.

    Attributes:
        x_scale: [...] float32; weight_scale: [N] float32.
        x_zero: [...] int32; weight_sum: [N] int32, of the weight's rows. Both or none.
    """

    x_scale: Tensor
    weight_scale: Tensor
    x_zero: Tensor | None
    weight_sum: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(
        cls, x_scale: Tensor, weight_scale: Tensor, x_zero: Tensor | None, weight_q: Tensor, dtype: torch.dtype
    ) -> "Quantized":
        """The sums of the weight's rows are of this weight, now: a pass over it, where there is a zero point."""
        weight_sum = None if x_zero is None else weight_q.sum(-1, dtype=torch.int32)
        return cls(x_scale.contiguous(), weight_scale.contiguous(), contiguous(x_zero), weight_sum, dtype)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x_scale, self.weight_scale, self.x_zero, self.weight_sum


def scale_sums(sums: Tensor, quantized: Quantized, bias: Tensor | None, residual: Tensor | None, gelu: bool) -> Tensor:
    """y [M, N] from the sums [M, N] of a GEMM, float32 or int32."""
    M, N = sums.shape
    residual_rows = None if residual is None else operand(residual)
    y = sums.new_empty((M, N), dtype=quantized.dtype)
    block_m, block_n = 16, 128
    launch.run(
        epilogue_kernel,
        (cdiv(M, block_m), cdiv(N, block_n)),
        *(sums, *quantized.tensors, contiguous(bias), residual_rows, y),
        *(M, N, 0 if residual_rows is None else residual_rows.stride(0)),
        GELU=gelu,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return y


def multiply(
    config: LinearConfig,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    save_pre_activation: bool,
    quantized: Quantized | None,
) -> tuple[Tensor, Tensor | None]:
    """y [..., N] and z, where it is to be saved."""
    target = launch.target_of(x)
    if x.dtype == torch.float8_e4m3fn and not target.multiplies_float8:
        raise ValueError(
            f"linear_fp8: backend 'triton_gemm' needs a GPU that multiplies float8_e4m3fn (compute capability 8.9 or "
            f"higher, gfx950), got {target.name}; use backend='triton', which multiplies in bfloat16 there"
        )
    x_rows, weight_rows = operand(x), operand(weight)
    residual_rows = None if residual is None else operand(residual)
    (M, K), N = x_rows.shape, weight.shape[0]
    if N >= MAX_STRIDE:
        raise ValueError(f"linear: weight must have fewer than {MAX_STRIDE} rows for backend 'triton_gemm', got {N}")
    shape = (*x.shape[:-1], N)
    dtype = x.dtype if residual is None else residual.dtype
    y = x.new_empty(shape, dtype=dtype if quantized is None else quantized.dtype)
    scales = (None,) * 4 if quantized is None else quantized.tensors
    z = x.new_empty(shape) if save_pre_activation else None
    stride_residual = 0 if residual_rows is None else residual_rows.stride(0)
    launch.run(
        linear_kernel,
        (cdiv(M, config.rows) * cdiv(N, config.columns),),
        *(x_rows, weight_rows, *scales, contiguous(bias), contiguous(gamma), residual_rows, z, y),
        *(M, N, K, x_rows.stride(0), weight_rows.stride(0), stride_residual),
        GELU=gelu,
        WHOLE_K=K % config.depth == 0,
        **config.constants(),
    )
    return y, z


def operand(x: Tensor) -> Tensor:
    """x as rows within reach of int32, 16 bytes at a time wherever their length allows it: else a copy."""
    x = as_rows(x)
    aligned = x.stride(0) % 16 == 0 or x.shape[1] % 16 != 0
    return x if aligned and x.stride(0) < MAX_STRIDE else x.contiguous()


@functools.cache
def linear_config(kernel: str, K: int, N: int, dtype: torch.dtype, target: Target) -> LinearConfig:
    key = tuned_key(K, N, dtype)
    promotes = dtype == torch.float8_e4m3fn and target.matrix_instructions == "wgmma"
    rule = functools.partial(LinearConfig.rule, K, N, dtype.itemsize, target, promotes)
    return configs.choose(LinearConfig, kernel, key, target, rule)


def tuned_key(K: int, N: int, dtype: torch.dtype) -> str:
    return f"K={K},N={N},bytes={dtype.itemsize}"


def linear(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None = None,
    residual: Tensor | None = None,
    gelu: bool = False,
    save_pre_activation: bool = False,
    quantized: Quantized | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`multiply` in the configuration that `kernel` has for this weight."""
    N, K = weight.shape
    config = linear_config(kernel, K, N, x.dtype, launch.target_of(x))
    args = (x, weight, bias, gamma, residual, gelu, save_pre_activation, quantized)
    return configs.call(kernel, tuned_key(K, N, x.dtype), config, multiply, *args)
