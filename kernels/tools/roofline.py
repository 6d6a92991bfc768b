"""The least time an op can take on a device: bytes over bandwidth or flops over peak, whichever is longer.

    python -m internvit.kernels.tools.roofline [--batch 8]

`static_profile` has the same of each kernel alone, as a column.

Arithmetic from data sheets, no measurement: never to be printed beside one as if it were.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass

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

ACTIVATIONS = {
    "rms_norm": 2,
    "rms_norm_backward": 3,
    "layer_norm": 2,
    "layer_norm_backward": 3,
    "layer_scale_residual": 3,
    "layer_scale_residual_backward": 3,
    "layer_scale_residual_norm": 4,
    "layer_scale_residual_norm_backward": 6,
    "qk_norm_stats": 2,
    "qk_norm_stats_backward": 6,
    "qk_norm": 4,
    "qk_norm_backward": 6,
}
"""Tensors [M, C] that an op must read or write once."""


def work(op: str, batch: int, heads: int, head_dim: int, tokens: int = 1025) -> tuple[float, float]:
    """Bytes of activations and flops of matrix products of an op in bfloat16."""
    one = 2.0 * batch * tokens * heads * head_dim
    if op == "attention":  # reads q, k, v, writes out; two products
        return 4 * one, 4.0 * batch * heads * tokens**2 * head_dim
    if op == "attention_backward":  # reads q, k, v, out, grad_out, writes three; five products, none recomputed twice
        return 8 * one, 10.0 * batch * heads * tokens**2 * head_dim
    if op in ("gelu", "gelu_backward"):
        return (8 if op == "gelu" else 12) * one, 0.0
    return ACTIVATIONS[op] * one, 0.0


MATRIX_PRODUCTS = {"attention_kernel": 2, "attention_grad_kv_kernel": 4, "attention_grad_q_kernel": 3}
"""Products over all pairs of tokens that a kernel computes: the backward pair recomputes the scores twice."""


def kernel_work(kernel: str, tensors: Iterable[Tensor]) -> tuple[float, float]:
    """Bytes of a kernel's tensors, each moved once, and flops of its matrix products; attention's first tensor is q."""
    unique = list({id(t): t for t in tensors}.values())
    flops = 0.0
    if kernel in MATRIX_PRODUCTS:
        B, N, H, D = unique[0].shape
        flops = 2.0 * MATRIX_PRODUCTS[kernel] * B * H * N * N * D
    return float(sum(t.numel() * t.element_size() for t in unique)), flops


def seconds(target: str, bytes_moved: float, flops: float) -> float:
    """The least time of that work on the device of `target`."""
    return next(c for c in CEILINGS if c.target == target).seconds(bytes_moved, flops)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m internvit.kernels.tools.roofline", description=__doc__)
    parser.add_argument("--batch", type=int, default=8, help="images of 448 pixels, 1025 tokens each")
    batch = parser.parse_args().batch
    for ceiling in CEILINGS:
        print(f"{ceiling.device}: {ceiling.bandwidth / 1e12} TB/s, {ceiling.flops / 1e12} TFLOP/s ({ceiling.source})")
    print(f"\ntime at the ceilings, us, {batch} x 1025 tokens, bfloat16; arithmetic, not measured")
    print(f"{'op':36} {'model':5} " + " ".join(f"{c.device:>14}" for c in CEILINGS))
    for model, heads, head_dim in (("6B", 25, 128), ("300M", 16, 64)):
        for op in (*ACTIVATIONS, "attention", "attention_backward", "gelu", "gelu_backward"):
            times = (1e6 * c.seconds(*work(op, batch, heads, head_dim)) for c in CEILINGS)
            print(f"{op:36} {model:5} " + " ".join(f"{t:14.1f}" for t in times))


if __name__ == "__main__":
    main()
