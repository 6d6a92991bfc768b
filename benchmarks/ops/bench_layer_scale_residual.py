"""residual + gamma * branch, forward and backward, next to the eager chain and torch.compile of it."""

from collections.abc import Callable

import torch
from torch import Tensor

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, op_work, tokens_of, vector


def plain(residual: Tensor, branch: Tensor, gamma: Tensor) -> Tensor:
    return residual + branch * gamma


def tiny(setting: Setting) -> Callable[[], object]:
    x, gamma = torch.ones(1, 64, device=setting.device), torch.ones(64, device=setting.device)
    return lambda: ops.layer_scale_residual(x, x, gamma)


def works(setting: Setting) -> list[Work]:
    found = []
    for _, images, tokens, width in tokens_of(setting):
        for dtype in setting.dtypes:
            generator, activation = setting.generator(), images * tokens * width * dtype.itemsize

            def make(shape=(images, tokens, width), generator=generator) -> tuple[Tensor, ...]:
                residual, branch = torch.randn((2, *shape), generator=generator)
                return residual, branch, vector(shape[-1], generator, 0.5)

            found.append(
                op_work(
                    setting,
                    "layer_scale_residual",
                    f"{images * tokens}x{width}",
                    dtype,
                    make,
                    lambda residual, branch, gamma, backend: ops.layer_scale_residual(
                        residual, branch, gamma, None, backend
                    ),
                    plain,
                    magnitude=lambda residual, branch, gamma: residual.abs() + (branch * gamma).abs(),
                    bytes=(3 * activation, 6 * activation),
                )
            )
    return found


def test_layer_scale_residual(timed) -> None:
    timed()
