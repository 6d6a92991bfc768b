"""The least time a kernel can take on a device: bytes over bandwidth or flops over peak, whichever is longer.

`static_profile` has it as a column; the ops' own table is `internvit.benchmarks.reports.op_tables`.

Arithmetic from data sheets, no measurement: never to be printed beside one as if it were.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ceiling:
    """Attributes:
    target: the name of its `Target`.
    bandwidth: of device memory, bytes a second.
    flops: dense bfloat16 products with float32 accumulation, a second.
    source: the vendor's data sheet.
    """

    device: str
    target: str
    bandwidth: float
    flops: float
    source: str

    def seconds(self, bytes_moved: float, flops: float) -> float:
        return max(bytes_moved / self.bandwidth, flops / self.flops)


CEILINGS = (
    Ceiling("A100 SXM 80GB", "sm_80", 2.039e12, 312e12, "NVIDIA A100 Tensor Core GPU data sheet"),
    Ceiling("A40", "sm_86", 0.696e12, 149.7e12, "NVIDIA A40 data sheet"),
    Ceiling("L40S", "sm_89", 0.864e12, 362.05e12, "NVIDIA L40S data sheet, dense"),
    Ceiling("H100 SXM", "sm_90", 3.35e12, 989.4e12, "NVIDIA H100 Tensor Core GPU data sheet, dense = half of sparse"),
    Ceiling("B200", "sm_100", 8.0e12, 2250e12, "NVIDIA HGX B200 data sheet, dense = half of sparse, one of eight GPUs"),
    Ceiling("RTX 5090", "sm_120", 1.792e12, 209.5e12, "NVIDIA RTX Blackwell GPU architecture, float32 accumulation"),
    Ceiling("MI250X, one die", "gfx90a", 1.638e12, 191.5e12, "AMD Instinct MI250X data sheet, half of two dies"),
    Ceiling("MI300X", "gfx942", 5.3e12, 1307.4e12, "AMD Instinct MI300X data sheet"),
    Ceiling("MI355X", "gfx950", 8.0e12, 2516.6e12, "AMD Instinct MI355X data sheet, dense"),
    Ceiling("RX 7900 XTX", "gfx1100", 0.96e12, 122.8e12, "AMD Radeon RX 7900 XTX specifications"),
)

MATRIX_PRODUCTS = {
    "attention_kernel": 2,
    "attention_column_sums_kernel": 1,
    "attention_grad_kv_kernel": 4,
    "attention_grad_q_kernel": 3,
}
"""Products over all pairs of tokens that a kernel computes: the backward pair recomputes the scores twice."""


GEMMS = ("linear_kernel", "norm_linear_kernel")


def multiplies(kernel: str) -> bool:
    """Whether `kernel` computes matrix products."""
    return kernel in GEMMS or kernel in MATRIX_PRODUCTS


def kernel_work(kernel: str, tensors: Iterable[Tensor]) -> tuple[float, float]:
    """Bytes of a kernel's tensors, each moved once, and flops of its matrix products; attention's first tensor is q,
    a GEMM's first are x and weight. The sequences of a pack count as equally long: fewer flops no lengths take. Of int8
    and float8 operands half of the flops are counted: each target multiplies them at twice the rate."""
    unique = list({id(t): t for t in tensors}.values())
    flops = 0.0
    if kernel in MATRIX_PRODUCTS:
        B, N, H, D = unique[0].shape
        sequences = [B, *(t.numel() - 1 for t in unique if t.dtype == torch.int32)][-1]
        flops = 2.0 * MATRIX_PRODUCTS[kernel] * H * (B * N) ** 2 / max(sequences, 1) * D
    elif kernel in GEMMS:
        one_byte = unique[0].element_size() == 1
        flops = (1.0 if one_byte else 2.0) * unique[0].numel() * unique[1].shape[0]
    return float(sum(t.numel() * t.element_size() for t in unique)), flops


def seconds(target: str, bytes_moved: float, flops: float) -> float:
    """The least time of that work on the device of `target`."""
    return next(c for c in CEILINGS if c.target == target).seconds(bytes_moved, flops)
