"""fc1 with exact GELU, forward and backward, next to the eager pair and torch.compile of it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, gemm_dtypes, op_work, tokens_of, vector


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def tiny(setting: Setting) -> Callable[[], object]:
    x, weight = torch.ones(1, 64, device=setting.device), torch.ones(64, 64, device=setting.device)
    return lambda: ops.linear_gelu(x, weight)


def works(setting: Setting) -> list[Work]:
    found = []
    for _, images, tokens, width in tokens_of(setting):
        images = images if setting.device.startswith("cuda") else 1
        for dtype in gemm_dtypes(setting, width):
            generator, out = setting.generator(), 4 * width
            activation, product = images * tokens * width * dtype.itemsize, 2.0 * images * tokens * width * out
            parameters = width * out * dtype.itemsize

            def make(shape=(images, tokens, width), out=out, generator=generator) -> tuple[Tensor, ...]:
                weight = torch.randn(out, shape[-1], generator=generator) * shape[-1] ** -0.5
                return torch.randn(shape, generator=generator), weight, vector(out, generator)

            found.append(
                op_work(
                    setting,
                    "linear_gelu",
                    f"{images * tokens}x{width}x{out}",
                    dtype,
                    make,
                    lambda x, weight, bias, backend: ops.linear_gelu(x, weight, bias, backend),
                    plain,
                    product=True,
                    bytes=(5 * activation + parameters, 14 * activation + 3 * parameters),
                    flops=(product, 3 * product),
                )
            )
    return found


def test_linear_gelu(timed) -> None:
    timed()
