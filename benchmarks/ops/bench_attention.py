"""Attention on a packed QKV buffer's views, forward and backward, next to SDPA and flash-attn."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from internvit import ops
from internvit.benchmarks.harness.cases import Setting, Work, op_work
from internvit.benchmarks.harness.peers import flash_attn, sdpa


def shapes_of(setting: Setting) -> tuple[tuple[int, int, int, int], ...]:
    """Images, tokens, heads, head dimension: the 300M's and the 6B's at 448 px, and fewer and more tokens."""
    if setting.quick:
        return ((1, 257, 16, 64),)
    if setting.device.startswith("cuda"):
        return tuple((b, n, *heads) for b, n in ((1, 1025), (8, 1025), (8, 257), (1, 4097)) for heads in HEADS)
    return (1, 1025, 16, 64), (4, 1025, 16, 64), (1, 257, 16, 64), (1, 4097, 16, 64), (1, 1025, 25, 128)


HEADS = ((16, 64), (25, 128))


def cost(images: int, tokens: int, heads: int, head_dim: int, itemsize: int) -> dict[str, Any]:
    """q, k, v and out once, two products; backward reads five, writes three, five products. For `op_work`."""
    one = images * tokens * heads * head_dim * itemsize
    product = 2.0 * images * heads * tokens**2 * head_dim
    return {"bytes": (4 * one, 12 * one), "flops": (2 * product, 7 * product)}


def plain(qkv: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    return (((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)


def ours(qkv: Tensor, backend: str) -> Tensor:
    q, k, v = qkv.unbind(2)
    return ops.attention(q, k, v, backend=backend)


def tiny(setting: Setting) -> Callable[[], object]:
    x = torch.ones(1, 1, 1, 64, device=setting.device)
    return lambda: ops.attention(x, x, x)


def works(setting: Setting) -> list[Work]:
    found = []
    for images, tokens, heads, head_dim in shapes_of(setting):
        for dtype in setting.dtypes if tokens <= 1025 else setting.dtypes[:1]:
            generator = setting.generator()

            def make(shape=(images, tokens, 3, heads, head_dim), generator=generator) -> tuple[Tensor, ...]:
                return (torch.randn(shape, generator=generator),)

            found.append(
                op_work(
                    setting,
                    "attention",
                    f"{images}x{tokens}x{heads}x{head_dim}",
                    dtype,
                    make,
                    ours,
                    plain,
                    {"SDPA": lambda: lambda qkv: sdpa(*qkv.unbind(2)), **flash_attn(setting)},
                    product=True,
                    head_dim=head_dim,
                    **cost(images, tokens, heads, head_dim, dtype.itemsize),
                    sizes={"batch": images, "tokens": tokens, "heads": heads, "head_dim": head_dim},
                    compile_peer=False,
                    trains=tokens <= 1025,
                )
            )
    return found


def test_attention(timed) -> None:
    timed()
