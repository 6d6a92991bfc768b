"""QK-norm over all heads of a packed QKV buffer's q and k, next to the eager norms."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, op_work, vector

EPS = 1e-6


def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, ...]:
    q, k, _ = qkv.unbind(2)
    return tuple(F.rms_norm(x.flatten(2), w.shape, w, EPS).view(x.shape) for x, w in ((q, q_weight), (k, k_weight)))


def ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, backend: str) -> tuple[Tensor, ...]:
    q, k, _ = qkv.unbind(2)
    return ops.qk_norm(q, k, q_weight, k_weight, EPS, backend=backend)


def tiny(setting: Setting) -> Callable[[], object]:
    x, weight = torch.ones(1, 1, 1, 64, device=setting.device), torch.ones(64, device=setting.device)
    return lambda: ops.qk_norm(x, x, weight, weight)


def works(setting: Setting) -> list[Work]:
    found = []
    for images, tokens, heads, head_dim in ((1, 257 if setting.quick else 1025, 25, 128),):
        for dtype in setting.dtypes:
            generator, width = setting.generator(), heads * head_dim
            activation = images * tokens * width * dtype.itemsize

            def make(shape=(images, tokens, 3, heads, head_dim), generator=generator, width=width):
                weights = (vector(width, generator, 1.0) for _ in range(2))
                return torch.randn(shape, generator=generator), *weights

            found.append(
                op_work(
                    setting,
                    "qk_norm",
                    f"{images}x{tokens}x{heads}x{head_dim}",
                    dtype,
                    make,
                    ours,
                    plain,
                    bytes=(4 * activation, 10 * activation),
                )
            )
    return found


def test_qk_norm(timed) -> None:
    timed()
