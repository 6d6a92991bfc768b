"""Linears of the CPU with a packed copy of their weight, and how a changed weight is noticed."""

from collections.abc import Iterable

import torch
from torch import Tensor

from internvit.ops.backends import native
from internvit.ops.linear import cpu_multiplies


class PackedLinear:
    """A Linear of the CPU library; GELU or the residual ride in the epilogue.

    Its bits do not depend on the number of rows. One image at a time stays in the caches: batch 4 of the 300M is 4 to
    6 % faster so (one core of a busy EPYC, Zen 4).
    """

    one_image = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = torch.ops.internvit_cpu.pack_weight(weight)
        self.out_features = weight.shape[0]
        self.bias = None if bias is None else bias.float()

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        return torch.ops.internvit_cpu.linear_packed(x, self.packed, self.out_features, self.bias, residual, gelu)


class PrepackedLinear:
    """A Linear by oneDNN; GELU or the residual ride in the epilogue.

    oneDNN's bits depend on the number of rows, so it gets one image at a time (`OptimizedInternViT.forward`).
    """

    one_image = True

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1025)  # a hint, not a limit
        self.bias = None if bias is None else bias.clone()

    def __call__(self, x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        pointwise = torch.ops.mkldnn._linear_pointwise
        if residual is not None:
            return pointwise.binary(x, residual, self.packed, self.bias, "add")
        if gelu:
            return pointwise(x, self.packed, self.bias, "gelu", [], "none")
        return pointwise(x, self.packed, self.bias, "none", [], "")


def onednn_packs() -> bool:
    """Whether this torch has oneDNN's prepacked Linear, a private op, for bfloat16 on this machine."""
    ops = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return (
        torch.backends.mkldnn.is_available() and all(hasattr(ops, n) for n in names) and ops._is_mkldnn_bf16_supported()
    )


def own_packs(dtype: torch.dtype) -> bool:
    """Whether the CPU library has a GEMM of its own for `dtype` here."""
    return native.unavailable_reason("internvit_cpu") is None and torch.ops.internvit_cpu.packs_linear(dtype)


def own_is_faster() -> bool:
    """Whether it is faster than oneDNN's, where both are: without AMX."""
    return "amx" not in torch.ops.internvit_cpu.instruction_sets().split()


def packed_linear_class(weight: Tensor) -> type[PackedLinear] | type[PrepackedLinear] | None:
    """The fastest packed Linear for this weight, never by the number of rows; None where PyTorch's own is as fast.

    bfloat16 at 1025 rows, the four Linears of a 300M block with their epilogues. One core of a busy EPYC (Zen 4),
    VDPBF16PS, CPU time, medians of 15 interleaved: own 119.5 ms, oneDNN prepacked 121.8. One Xeon core with AMX:
    oneDNN prepacked 30.5 ms, PyTorch 35.3, own tiles 37.5. One Xeon core without bfloat16 products (Cascade Lake): own
    210 ms, oneDNN prepacked 998, `internvit.ops.linear` 227.
    """
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float32) or weight.numel() == 0:
        return None
    own = own_packs(weight.dtype)
    if own and own_is_faster():
        return PackedLinear
    if weight.dtype == torch.bfloat16 and onednn_packs() and cpu_multiplies(weight.dtype):
        return PrepackedLinear
    return PackedLinear if own else None


def fold_layer_scale(weight: Tensor, bias: Tensor | None, gamma: Tensor) -> tuple[Tensor, Tensor | None]:
    """gamma * weight and gamma * bias, computed in float64 and rounded once."""
    folded = (gamma.double().unsqueeze(1) * weight.double()).to(weight.dtype)
    return folded, None if bias is None else (gamma.double() * bias.double()).to(bias.dtype)


def row_checksums(tensors: Iterable[Tensor | None]) -> Tensor:
    """The sum of each row of each tensor, its bits taken as integers; of a vector, its elements.

    Reads every bit, so that a write is noticed whatever wrote: autograd's version counters do not see `.data`, and
    inference tensors have none. Writes within one row whose differences add up to zero pass. 24 GB/s a core (EPYC).
    """
    return torch.cat([_row_sums(t.detach()) for t in tensors if t is not None])


def _row_sums(t: Tensor) -> Tensor:
    rows = t.contiguous() if t.dim() > 1 else t.contiguous().unsqueeze(-1)
    row_bytes, offset = rows.shape[-1] * rows.itemsize, rows.storage_offset() * rows.itemsize
    small = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.itemsize]
    words = rows.view(small if row_bytes % 8 or offset % 8 else torch.int64)
    return words.sum(-1, dtype=torch.int64).flatten()
