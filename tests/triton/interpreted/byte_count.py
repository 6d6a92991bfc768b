"""Counts the bytes that kernels move, load by load and store by store, in Triton's interpreter.

TRITON_INTERPRET=1 python tests/triton/interpreted/byte_count.py

prints, per op, the bytes of activations (tensors with a row per token) over the floor, those of parameters and partial
rows beside them, and what eager PyTorch's sequence of ops moves for the same result. K and V, which every query tile
of attention reads again, are a third column.
"""

import collections
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpreterBuilder

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parent)]

import interpreter  # noqa: E402
from harness import Memory, run  # noqa: E402

from internvit.kernels import attention  # noqa: E402
from internvit.kernels.attention_launch import AttentionLaunch  # noqa: E402
from internvit.ops.backends import REFERENCE  # noqa: E402

ROWS = 24


@contextmanager
def counting() -> Iterator[collections.Counter]:
    """Inside, the counter holds the bytes moved at each element's address."""
    moved: collections.Counter = collections.Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(ptrs: Any, mask: Any) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses, mask = (a.ravel() for a in (ptrs.data, mask.data))
        for address in addresses[mask.astype(bool)].tolist():
            moved[address] += size

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        count(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield moved
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def within(moved: collections.Counter, tensors: list[Tensor]) -> int:
    ranges = [(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in tensors]
    return sum(n for address, n in moved.items() if any(a <= address < b for a, b in ranges))


class EagerBytes(TorchDispatchMode):
    """Bytes of the activations that each aten op reads and writes; views move nothing."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if t.numel() >= self.elements)
        return out


def cases(C: int) -> dict[str, tuple[int, Callable[[Memory], tuple]]]:
    """op -> (activations in the floor, its arguments)."""
    heads, head_dim = (25, 128) if C == 3200 else (16, 64)

    def x(memory: Memory) -> Tensor:
        return memory.place(torch.randn(1, ROWS, C).bfloat16())

    def w(memory: Memory) -> Tensor:
        return memory.place(torch.randn(C).bfloat16())

    def stat(memory: Memory) -> Tensor:
        return memory.place(torch.rand(1, ROWS))

    def h(memory: Memory) -> Tensor:
        return x(memory).view(1, ROWS, heads, head_dim)

    scale = torch.ones(1)
    return {
        "rms_norm": (2, lambda m: (x(m), w(m), 1e-6, "fused")),
        "rms_norm_backward": (3, lambda m: (x(m), x(m), w(m), stat(m), (True, True))),
        "layer_norm": (2, lambda m: (x(m), w(m), w(m), 1e-6)),
        "layer_norm_backward": (3, lambda m: (x(m), x(m), w(m), stat(m), stat(m), (True,) * 3)),
        "layer_scale_residual": (3, lambda m: (x(m), x(m), w(m), scale)),
        "layer_scale_residual_backward": (3, lambda m: (x(m), x(m), w(m), scale, torch.bfloat16, (True, True))),
        "layer_scale_residual_norm": (
            4,
            lambda m: (x(m), x(m), w(m), scale, w(m), None, 1e-6, "rms_norm", "fused"),
        ),
        "layer_scale_residual_norm_backward": (
            6,
            lambda m: (
                *(x(m) for _ in range(4)),
                w(m),
                scale,
                w(m),
                stat(m),
                stat(m),
                "rms_norm",
                (True,) * 4 + (False,),
            ),
        ),
        "qk_norm_stats": (2, lambda m: (h(m), h(m), 1e-6)),
        "qk_norm_stats_backward": (6, lambda m: (stat(m), stat(m), h(m), h(m), stat(m), stat(m), h(m), h(m))),
        "qk_norm": (4, lambda m: (h(m), h(m), w(m), w(m), 1e-6, "fused")),
        "qk_norm_backward": (6, lambda m: (*(h(m) for _ in range(4)), w(m), w(m), stat(m), stat(m), (True,) * 4)),
        "gelu": (2, lambda m: (x(m),)),
        "gelu_backward": (3, lambda m: (x(m), x(m))),
    }


def measure(op: str, C: int) -> dict[str, Any]:
    """Bytes over the floor of activations, parameters and partial rows, and eager PyTorch's activations."""
    units, arguments = cases(C)[op]
    floor = units * ROWS * C * 2
    memory = Memory()
    args = arguments(memory)
    with counting() as moved:
        run(memory, op, *args)
    storages = [storage for storage, _ in memory.storages]
    # a row per token: activations, and the statistics; partial rows [sums, programs, C] are float32 and no rows of x
    tokens = [s for s, n in memory.storages if n == ROWS or (n == ROWS * C and s.dtype != torch.float32)]
    activations, everything = within(moved, tokens), sum(moved.values())
    assert within(moved, storages) + 4 * ROWS * 8 >= everything, "some bytes are not in the buffers known"
    eager = EagerBytes(ROWS * C)
    with eager:
        REFERENCE[op](*args)
    return {
        "op": op,
        "C": C,
        "activations": activations / floor,
        "parameters and partials": (everything - activations) / floor,
        "eager activations": eager.bytes / floor,
    }


def measure_attention(tokens: int, rows: int = 128) -> dict[str, Any]:
    """q and out over their floor, and how often K and V are read with `rows` queries a tile."""
    memory, choice = Memory(), AttentionLaunch(rows, 64, 4, 1)
    q, k, v = (memory.place(torch.randn(1, tokens, 1, 64).bfloat16()) for _ in range(3))
    with counting() as moved, mock.patch.object(attention, "attention_launch", return_value=choice):
        run(memory, "attention", q, k, v, 0.125, None, None, None, None)
    one = q.numel() * 2
    everything, kv = sum(moved.values()), within(moved, [k, v])
    return {"tokens": tokens, "q, out, lse": (everything - kv) / (2 * one), "K and V reads": kv / (2 * one)}


def main() -> None:
    print(f"{'op':36} {'C':>5} {'activations':>12} {'+ parameters':>13} {'eager':>7}   (1.00 = the floor)")
    for C in (1024, 3200):
        for op in cases(C):
            row = measure(op, C)
            print(
                f"{op:36} {C:5} {row['activations']:12.3f} {row['parameters and partials']:13.3f}"
                f" {row['eager activations']:7.2f}",
                flush=True,
            )
    for tokens, rows in ((257, 128), (1025, 64), (1025, 128), (1025, 256)):
        row = measure_attention(tokens, rows)
        print(
            f"attention, {tokens} tokens, {rows} queries a tile:"
            f" q, out and lse {row['q, out, lse']:.3f} of their floor;"
            f" K and V read {row['K and V reads']:.0f} times"
        )


if __name__ == "__main__":
    interpreter.mend()
    main()
