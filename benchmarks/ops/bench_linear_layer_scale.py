"""fc2 with LayerScale folded into its weight, next to the eager pair, which keeps the branch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, gemm_dtypes, op_work, tokens_of, vector


def plain(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor) -> Tensor:
    return F.linear(x, weight, bias) * gamma


def tiny(setting: Setting) -> Callable[[], object]:
    x, weight = torch.ones(1, 64, device=setting.device), torch.ones(64, 64, device=setting.device)
    return lambda: ops.linear_layer_scale(x, weight, None, x[0])


def works(setting: Setting) -> list[Work]:
    found = []
    for _, images, tokens, width in tokens_of(setting):
        images = images if setting.device.startswith("cuda") else 1
        for dtype in gemm_dtypes(setting, width):
            generator, inner = setting.generator(), 4 * width
            activation, product = images * tokens * width * dtype.itemsize, 2.0 * images * tokens * width * inner
            parameters = width * inner * dtype.itemsize

            def make(shape=(images, tokens, inner), width=width, generator=generator) -> tuple[Tensor, ...]:
                weight = torch.randn(width, shape[-1], generator=generator) * shape[-1] ** -0.5
                x, gamma = torch.randn(shape, generator=generator), vector(width, generator, 0.1)
                return x, weight, vector(width, generator), gamma

            found.append(
                op_work(
                    setting,
                    "linear_layer_scale",
                    f"{images * tokens}x{inner}x{width}",
                    dtype,
                    make,
                    lambda x, weight, bias, gamma, backend: ops.linear_layer_scale(x, weight, bias, gamma, backend),
                    plain,
                    product=True,
                    # The folded weight is written and read; so is the gradient of it.
                    bytes=(5 * activation + 3 * parameters, 15 * activation + 9 * parameters),
                    flops=(product, 3 * product),
                )
            )
    return found


def test_linear_layer_scale(timed) -> None:
    timed()
