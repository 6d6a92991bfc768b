"""The residual seam with the next norm, forward and backward, next to the eager chain and torch.compile of it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, double, op_work, tokens_of, vector
from internvit.benchmarks.ops import bench_layer_norm, bench_rms_norm
from internvit.numerics import layer_norm_terms, norm_failures

EPS = 1e-6


def plain(residual: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    out = residual + branch * gamma
    if bias is None:
        return out, F.rms_norm(out, weight.shape, weight, EPS)
    return out, F.layer_norm(out, weight.shape, weight, bias, EPS)


def ours(
    residual: Tensor, branch: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> tuple[Tensor, ...]:
    kind = "rms_norm" if bias is None else "layer_norm"
    return ops.layer_scale_residual_norm(residual, branch, gamma, None, weight, bias, EPS, kind, backend=backend)


def tiny(setting: Setting) -> Callable[[], object]:
    x, gamma = torch.ones(1, 64, device=setting.device), torch.ones(64, device=setting.device)
    return lambda: ops.layer_scale_residual_norm(x, x, gamma, None, gamma)


def failures_of(result: tuple[Tensor, ...], inputs: tuple) -> list[str]:
    """The norm is judged by the residual as rounded to its dtype, which is what it takes its statistics from."""
    residual, branch, gamma, weight, bias = inputs
    out, normed = result
    wide = double((residual, branch, gamma))
    terms = wide[0].abs() + (wide[1] * wide[2]).abs()
    failures = norm_failures(out, wide[0] + wide[1] * wide[2], residual + branch * gamma, terms)
    if bias is None:
        truth, eager = bench_rms_norm.plain(*double((out, weight))), bench_rms_norm.plain(out, weight)
        return failures + norm_failures(normed, truth, eager)
    wide = double((out, weight, bias))
    truth, eager = bench_layer_norm.plain(*wide), bench_layer_norm.plain(out, weight, bias)
    return failures + norm_failures(normed, truth, eager, layer_norm_terms(*wide))


def works(setting: Setting) -> list[Work]:
    found = []
    for kind, images, tokens, width in tokens_of(setting):
        for dtype in setting.dtypes:
            generator, activation = setting.generator(), images * tokens * width * dtype.itemsize

            def make(kind=kind, shape=(images, tokens, width), generator=generator) -> tuple[Tensor | None, ...]:
                residual, branch = torch.randn((2, *shape), generator=generator)
                gamma, weight = (vector(shape[-1], generator, offset) for offset in (0.5, 1.0))
                return residual, branch, gamma, weight, vector(shape[-1], generator) if kind == "layer_norm" else None

            found.append(
                op_work(
                    setting,
                    "layer_scale_residual_norm",
                    f"{images * tokens}x{width} {kind}",
                    dtype,
                    make,
                    ours,
                    plain,
                    judge=failures_of,
                    bytes=(4 * activation, 10 * activation),
                )
            )
    return found


def test_layer_scale_residual_norm(timed) -> None:
    timed()
