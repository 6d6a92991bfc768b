"""RMSNorm of rows, forward and backward, next to PyTorch's and Liger's kernel."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, op_work, tokens_of, vector
from internvit.benchmarks.harness.peers import liger

EPS = 1e-6


def plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def tiny(setting: Setting) -> Callable[[], object]:
    x, weight = torch.ones(1, 64, device=setting.device), torch.ones(64, device=setting.device)
    return lambda: ops.rms_norm(x, weight)


def works(setting: Setting) -> list[Work]:
    found = []
    for norm, images, tokens, width in tokens_of(setting):
        if norm != "rms_norm":
            continue
        for dtype in setting.dtypes:
            generator, activation = setting.generator(), images * tokens * width * dtype.itemsize

            def make(shape=(images, tokens, width), generator=generator) -> tuple[Tensor, ...]:
                return torch.randn(shape, generator=generator), vector(shape[-1], generator, 1.0)

            found.append(
                op_work(
                    setting,
                    "rms_norm",
                    f"{images * tokens}x{width}",
                    dtype,
                    make,
                    lambda x, weight, backend: ops.rms_norm(x, weight, EPS, backend=backend),
                    plain,
                    liger(setting, "LigerRMSNorm", width, EPS),
                    bytes=(2 * activation, 5 * activation),
                )
            )
    return found


def test_rms_norm(timed) -> None:
    timed()
