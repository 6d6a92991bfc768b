"""Attention on the CPU, forward and forward + backward, next to SDPA (and eager QK-norm before it).

python -m benchmarks.bench_attention [--rounds 30]
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import interleaved, rows_of, write
from internvit import ops
from internvit.contract import relative_error

CASES = [(1, 1025, 16, 64, False), (4, 1025, 16, 64, False), (1, 1025, 25, 128, True), (1, 257, 16, 64, False)]


def sdpa(qkv: Tensor, weight: Tensor | None) -> Tensor:
    q, k, v = qkv.unbind(2)
    if weight is not None:
        q, k = (F.rms_norm(t.flatten(2), weight.shape, weight, 1e-6).view(t.shape) for t in (q, k))
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for batch, tokens, heads, head_dim, normed in CASES:
        qkv = torch.randn(batch, tokens, 3, heads, head_dim, dtype=torch.bfloat16)
        weight = torch.rand(heads * head_dim, dtype=torch.bfloat16) + 0.5 if normed else None
        case = f"{batch}x{tokens}x{heads}x{head_dim}{' QK-norm' if normed else ''} bf16"
        with torch.no_grad():
            ours, theirs = ops.qk_norm_attention(qkv, None, None, weight, weight, backend="cpu"), sdpa(qkv, weight)
        if relative_error(ours, theirs.double()) > 0.02:
            raise SystemExit(f"{case}: the result is wrong, nothing is timed")

        def forward_ours(qkv: Tensor = qkv, weight: Tensor | None = weight) -> Tensor:
            return ops.qk_norm_attention(qkv, None, None, weight, weight, backend="cpu")

        def forward_sdpa(qkv: Tensor = qkv, weight: Tensor | None = weight) -> Tensor:
            return sdpa(qkv, weight)

        with torch.no_grad():
            times = interleaved({"internvit cpu": forward_ours, "SDPA": forward_sdpa}, arguments.rounds)
        rows += rows_of(f"{case} forward", times, "internvit cpu")
        leaf, grad = qkv.clone().requires_grad_(), torch.randn_like(ours)
        both = {
            "internvit cpu": lambda x=leaf, g=grad: torch.autograd.grad(forward_ours(x), x, g),
            "SDPA": lambda x=leaf, g=grad: torch.autograd.grad(forward_sdpa(x), x, g),
        }
        rows += rows_of(f"{case} forward + backward", interleaved(both, max(arguments.rounds // 3, 4)), "internvit cpu")
    write("cpu_attention", rows, 2)


if __name__ == "__main__":
    main()
