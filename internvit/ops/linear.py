"""A Linear whose bits do not depend on the batch: on CPU an image at a time.

oneDNN and MKL choose blocking, and with it the order of summation, by the number of rows: bfloat16 1024 -> 3072 gives
other bits for 257 tokens alone than for two images of 257. One call per image has one number of rows, always. Layout
matters as well: PyTorch adds the bias in the GEMM for some strides and after a rounding for others (a quarter of all
elements differ in bfloat16), and MKL's order of summation depends on where a row begins within 64 bytes.

x86 CPUs without products of a 16-bit dtype emulate them. There operands are widened to float32, in which each product
is exact, and the float32 sums rounded once: the 300M block's four Linears at 1025 tokens take 238 ms so, of float32's
222, where PyTorch takes 1008 in bfloat16 and 2584 in float16 (one core of a busy Cascade Lake).

With AVX2 and without AVX-512 the CPU library's GEMM multiplies float32 and bfloat16 wherever autograd does not record,
so in inference and in the fused ops of training. It packs the weight at each call, which takes as long as widening it,
and is faster than MKL (docs/benchmarks.md).
"""

import functools
import platform
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from internvit.ops.backends import native
from internvit.ops.core.autocast import autocast_dtype, cast
from internvit.ops.core.direct import modes, plain, traced
from internvit.ops.core.select import requested

_ALIGNMENT = 64
"""Bytes; those of every CPU tensor that PyTorch allocates."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str | None = None) -> Tensor:
    """x weight^T + bias for x [B, ..., K]; on CPU the same bits for x[i:i + 1] alone, in any batch and layout.

    Backend "reference", here or in force, is PyTorch alone.
    x [K] and [N, K] is one call of PyTorch's Linear. So is x in a traced program or under a mode, which may take any
    batch, and under forward-mode differentiation, which does not go through writes into views.
    """
    if x.device.type != "cpu" or traced():
        return F.linear(x, weight, bias)
    whole = x.dim() < 3 or x.shape[0] == 0 or modes() or forward_ad._current_level >= 0
    if whole and not emulated(x):
        return F.linear(x, weight, bias)
    x, weight, bias = _autocast(x, weight, bias)
    if not whole and (backend or requested()) != "reference" and _packs(x, weight, bias):
        return _packed(x, weight, bias)
    if not widens(x, weight, bias):
        return F.linear(x, weight, bias) if whole else _per_image(x, weight, bias, x.dtype)
    with torch.autocast("cpu", enabled=False):
        return _widened(x, weight, bias) if whole else _per_image(x, *_float32(weight, bias), torch.float32)


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias where gradients are wanted, in one call for the whole batch."""
    if x.device.type != "cpu" or traced() or forward_ad._current_level >= 0 or not emulated(x):
        return F.linear(x, weight, bias)
    operands = _autocast(x, weight, bias)
    if not widens(*operands):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        y: Tensor = _Widened.apply(*operands)
    return y


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b of a gradient [..., N] and a matrix [N, K], or of two matrices, in their dtype."""
    if not widens(a, b):
        return a @ b
    with torch.autocast("cpu", enabled=False):
        return (a.float() @ b.float()).to(a.dtype)


def widens(x: Tensor, *others: Tensor | None) -> bool:
    """Whether x [..., K] is multiplied by matrices of its dtype in float32, for want of products in that dtype.

    Below 16 rows of an image the conversion of a weight takes longer than the product.
    """
    if x.dim() < 2 or x.device.type != "cpu" or cpu_multiplies(x.dtype):
        return False
    rows = x.shape[0] if x.dim() == 2 else x.shape[1:-1].numel()
    return rows >= 16 and all(t is None or t.dtype == x.dtype for t in others)


def _packs(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the CPU library multiplies x [B, ..., K] faster than PyTorch, its weight packed first.

    Below 128 rows of an image packing takes longer than it saves.
    """
    if x.shape[1:-1].numel() < 128 or torch.is_grad_enabled() or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    given = [t for t in (x, weight, bias) if t is not None]
    if not plain(given) or any(t.dtype != x.dtype or t.layout != torch.strided for t in given):
        return False
    if weight.dim() != 2 or weight.numel() == 0 or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    return native.unavailable_reason("internvit_cpu") is None and torch.ops.internvit_cpu.packs_linear(torch.float32)


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The CPU library's product, an image at a time: so many rows are held in float32, and stay in the caches."""
    cpu, out_features = torch.ops.internvit_cpu, weight.shape[0]
    packed = cpu.pack_weight(weight)
    if x.shape[0] == 1:
        return cpu.linear_packed(x, packed, out_features, bias, None, False)
    out = x.new_empty((*x.shape[:-1], out_features))
    for image, destination in zip(x, out, strict=True):
        destination.copy_(cpu.linear_packed(image, packed, out_features, bias, None, False))
    return out


@functools.cache
def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has products of `dtype`, or is of a kind of which that is not known."""
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if kind is None or platform.machine() not in ("x86_64", "AMD64"):
        return True
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch
        return True
    has = torch.cpu.get_capabilities()
    return any(has.get(name, True) for name in (f"avx512_{kind}", f"amx_{kind}", "avx_ne_convert"))


def emulated(x: Tensor) -> bool:
    """Whether PyTorch would multiply x in a dtype that this CPU has no products of."""
    return x.device.type == "cpu" and not cpu_multiplies(autocast_dtype("cpu") or x.dtype)


class _Widened(torch.autograd.Function):
    """x weight^T + bias by float32 products; keeps x and weight as they came, as PyTorch's Linear does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _widened(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (x, weight) = grads[0], ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])  # batched gradients cannot be flattened
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = matmul(grad, weight) if needs_x else None
        grad_weight = matmul(rows.t(), x.flatten(0, -2)) if needs_weight else None
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x.float(), *_float32(weight, bias)).to(x.dtype)


def _float32(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.float(), None if bias is None else bias.float()


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast casts them for PyTorch's Linear."""
    dtype = autocast_dtype("cpu")
    if dtype is None:
        return x, weight, bias
    return cast(x, dtype), cast(weight, dtype), cast(bias, dtype)  # type: ignore[return-value]


def _per_image(x: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """The product in `wide`, the dtype of weight and bias, rounded to x's: one image at a time is held in it."""
    shape = (*x.shape[1:-1], weight.shape[0])
    if x.shape[0] == 1:
        return F.linear(_rows(x).to(wide), weight, bias).to(x.dtype).view(1, *shape)
    out = x.new_empty((x.shape[0], *shape))
    for image, destination in zip(x.split(1), out, strict=True):
        destination.copy_(F.linear(_rows(image).to(wide), weight, bias).view(shape))
    return out


def _rows(image: Tensor) -> Tensor:
    """image as [rows, K], contiguous and aligned."""
    rows = image.reshape(-1, image.shape[-1])
    if rows.is_contiguous() and rows.data_ptr() % _ALIGNMENT == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)
