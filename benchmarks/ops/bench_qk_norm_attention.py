"""Attention with QK-norm over all heads inside, forward and backward, next to eager norms and SDPA."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, op_work, vector
from internvit.benchmarks.harness.peers import sdpa
from internvit.benchmarks.ops import bench_attention

EPS = 1e-6


def normed(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unbind(2)
    q, k = (F.rms_norm(x.flatten(2), w.shape, w, EPS).view(x.shape) for x, w in ((q, q_weight), (k, k_weight)))
    return q, k, v


def plain(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in normed(qkv, q_weight, k_weight))
    return (((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)


def tiny(setting: Setting) -> Callable[[], object]:
    x, weight = torch.ones(1, 1, 3, 1, 64, device=setting.device), torch.ones(64, device=setting.device)
    return lambda: ops.qk_norm_attention(x, None, None, weight, weight)


def works(setting: Setting) -> list[Work]:
    found = []
    heads, head_dim = 25, 128
    batches = (1, 8) if setting.device.startswith("cuda") else (1,)
    for images, tokens in ((b, 257 if setting.quick else 1025) for b in batches):
        for dtype in setting.dtypes:
            generator, width = setting.generator(), heads * head_dim

            def make(shape=(images, tokens, 3, heads, head_dim), generator=generator, width=width):
                weights = (vector(width, generator, 1.0) for _ in range(2))
                return torch.randn(shape, generator=generator), *weights

            found.append(
                op_work(
                    setting,
                    "qk_norm_attention",
                    f"{images}x{tokens}x{heads}x{head_dim}",
                    dtype,
                    make,
                    lambda qkv, q_weight, k_weight, backend: ops.qk_norm_attention(
                        qkv, None, None, q_weight, k_weight, EPS, backend=backend
                    ),
                    plain,
                    {"eager QK-norm + SDPA": lambda: lambda *inputs: sdpa(*normed(*inputs))},
                    product=True,
                    implemented_as="attention",
                    head_dim=head_dim,
                    **bench_attention.cost(images, tokens, heads, head_dim, dtype.itemsize),
                    sizes={"batch": images, "tokens": tokens, "heads": heads, "head_dim": head_dim},
                    compile_peer=False,
                )
            )
    return found


def test_qk_norm_attention(timed) -> None:
    timed()
