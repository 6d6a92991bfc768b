"""LayerNorm of rows, forward and backward, next to PyTorch's and Liger's kernel."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, op_work, tokens_of, vector
from internvit.benchmarks.harness.peers import liger
from internvit.numerics import layer_norm_terms

EPS = 1e-6


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def tiny(setting: Setting) -> Callable[[], object]:
    x, weight = torch.ones(1, 64, device=setting.device), torch.ones(64, device=setting.device)
    return lambda: ops.layer_norm(x, weight, weight)


def works(setting: Setting) -> list[Work]:
    found = []
    for norm, images, tokens, width in tokens_of(setting):
        if norm != "layer_norm":
            continue
        for dtype in setting.dtypes:
            generator, activation = setting.generator(), images * tokens * width * dtype.itemsize

            def make(shape=(images, tokens, width), generator=generator) -> tuple[Tensor, ...]:
                x = torch.randn(shape, generator=generator)
                return x, vector(shape[-1], generator, 1.0), vector(shape[-1], generator)

            found.append(
                op_work(
                    setting,
                    "layer_norm",
                    f"{images * tokens}x{width}",
                    dtype,
                    make,
                    lambda x, weight, bias, backend: ops.layer_norm(x, weight, bias, EPS, backend),
                    plain,
                    liger(setting, "LigerLayerNorm", width, EPS),
                    magnitude=layer_norm_terms,
                    bytes=(2 * activation, 5 * activation),
                )
            )
    return found


def test_layer_norm(timed) -> None:
    timed()
