"""The statistics of QK-norm over all heads, next to the eager formula."""

from collections.abc import Callable

import torch
from torch import Tensor

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, op_work

EPS = 1e-6


def plain(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return tuple(torch.rsqrt(x.flatten(2).to(wide).square().mean(-1) + EPS) for x in (q, k))


def tiny(setting: Setting) -> Callable[[], object]:
    x = torch.ones(1, 1, 1, 64, device=setting.device)
    return lambda: ops.qk_norm_stats(x, x)


def works(setting: Setting) -> list[Work]:
    found = []
    for images, tokens, heads, head_dim in ((1, 257 if setting.quick else 1025, 25, 128),):
        for dtype in setting.dtypes:
            generator, activation = setting.generator(), images * tokens * heads * head_dim * dtype.itemsize

            def make(shape=(images, tokens, heads, head_dim), generator=generator) -> tuple[Tensor, ...]:
                return tuple(torch.randn((2, *shape), generator=generator).unbind(0))

            found.append(
                op_work(
                    setting,
                    "qk_norm_stats",
                    f"{images}x{tokens}x{heads}x{head_dim}",
                    dtype,
                    make,
                    lambda q, k, backend: ops.qk_norm_stats(q, k, EPS, backend),
                    plain,
                    bytes=(2 * activation, 6 * activation),
                )
            )
    return found


def test_qk_norm_stats(timed) -> None:
    timed()
