"""The residual seam on the CPU, forward and forward + backward, next to the eager chain and torch.compile of it.

python -m benchmarks.bench_layer_scale_residual_norm [--rounds 30]
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.timing import interleaved, rows_of, write
from internvit import ops
from internvit.contract import relative_error

CASES = [(8200, 1024, "layer_norm"), (1025, 3200, "rms_norm")]


def chain(residual: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    out = residual + branch * gamma
    shape = weight.shape
    return out, F.rms_norm(out, shape, weight, 1e-6) if bias is None else F.layer_norm(out, shape, weight, bias, 1e-6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    rows = []
    for tokens, width, kind in CASES:
        make = [torch.randn(1, tokens, width) for _ in range(2)] + [torch.rand(width) for _ in range(3)]
        residual, branch, gamma, weight, bias = (t.bfloat16() for t in make)
        given = bias if kind == "layer_norm" else None

        def ours(r: Tensor, b: Tensor, g: Tensor, w: Tensor, s: Tensor | None, kind: str = kind) -> tuple[Tensor, ...]:
            return ops.layer_scale_residual_norm(r, b, g, None, w, s, 1e-6, kind, backend="cpu")

        inputs = (residual, branch, gamma, weight, given)
        if relative_error(ours(*inputs)[1], chain(*inputs)[1].double()) > 0.01:
            raise SystemExit(f"{tokens}x{width}: the result is wrong, nothing is timed")
        compiled = torch.compile(chain)
        candidates = {"internvit cpu": ours, "eager": chain, "torch.compile": compiled}
        case = f"{tokens}x{width} {kind} bf16"
        with torch.no_grad():
            times = interleaved({n: lambda f=f, i=inputs: f(*i) for n, f in candidates.items()}, arguments.rounds, 4)
        rows += rows_of(f"{case} forward", times, "internvit cpu")
        leaves = tuple(t if t is None else t.clone().requires_grad_() for t in inputs)
        wanted = [t for t in leaves if t is not None]
        grads = [torch.randn_like(residual) for _ in range(2)]

        def both(f, leaves=leaves, wanted=wanted, grads=grads):  # type: ignore[no-untyped-def]
            return torch.autograd.grad(f(*leaves), wanted, grads)

        times = interleaved({n: lambda f=f: both(f) for n, f in candidates.items()}, arguments.rounds, 4)
        rows += rows_of(f"{case} forward + backward", times, "internvit cpu")
    write("cpu_layer_scale_residual_norm", rows, 2)


if __name__ == "__main__":
    main()
