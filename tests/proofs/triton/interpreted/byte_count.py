"""Counts the bytes that kernels move, load by load and store by store, in Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.proofs.triton.interpreted.byte_count [--update]

prints, per op, the bytes of activations (tensors with a row per token) over the floor, those of parameters and partial
rows, and what eager PyTorch's sequence of ops and Liger's kernels (extra `bench`) move for the same result; for
attention also how often each tile config reads K, V, Q and grad_out again. `--update` writes the counts to
tests/proofs/triton/bytes.json, which the tests hold the kernels to, and the table of them into docs/lower-bounds.md.
"""

import argparse
import functools
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

from internvit.benchmarks.reports.table import replace_section
from internvit.kernels.attention import config as attention_configs
from internvit.kernels.attention.config import AttentionConfig
from internvit.ops.backends.registry import has_implementation
from internvit.ops.core.spec import Inputs, Size, batched, every_spec
from tests.proofs.triton.interpreted.harness import Memory, run
from tests.support import ROOT, interpreter
from tests.support.implementations import OpCall, call, op_calls

BUDGET = ROOT / "tests/proofs/triton/bytes.json"
DOC = ROOT / "docs/lower-bounds.md"
START, END = "<!-- bytes: python -m tests.proofs.triton.interpreted.byte_count --update -->", "<!-- end of bytes -->"
ROWS = 24
COLUMNS = ("activations", "parameters and partials", "eager", "Liger")


class Moved:
    """Addresses of what was moved, and the bytes of each."""

    def __init__(self) -> None:
        self.moves: list[tuple[np.ndarray, int]] = []

    def total(self) -> int:
        return sum(len(addresses) * size for addresses, size in self.moves)

    def within(self, tensors: list[Tensor]) -> int:
        found = 0
        for start in {(t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in tensors}:
            found += sum(int(((a >= start[0]) & (a < start[1])).sum()) * size for a, size in self.moves)
        return found


@contextmanager
def counting() -> Iterator[Moved]:
    """Inside, what interpreted kernels load and store is counted."""
    moved = Moved()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(ptrs: Any, mask: Any) -> None:
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses, mask = np.broadcast_arrays(ptrs.data, mask.data)
        moved.moves.append((addresses[mask.astype(bool)].astype(np.int64), size))

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


class EagerBytes(TorchDispatchMode):
    """Bytes of the activations that each aten op reads and writes; views move nothing."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            read = () if "zeros" in func.name() else (args, kwargs)  # zeros_like reads a shape alone
            tensors = [t for t in torch.utils._pytree.tree_leaves((read, out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors if t.numel() >= self.elements)
        return out


@functools.cache
def cases(C: int) -> dict[str, OpCall]:
    """A call of each op over tokens that has kernels and multiplies no matrices, forward and backward."""
    size = Size(1, ROWS, *((25, 128) if C == 3200 else (16, 64)))
    found: dict[str, OpCall] = {}
    for spec in every_spec().values():
        if not spec.multiplies_matrices:
            example = next(iter(spec.examples.values()))
            arguments = example(Inputs(size, dtype=torch.bfloat16))
            calls = op_calls(spec, arguments) if batched(arguments) else []  # `fold_norm` is of weights
            found |= {one.op.name: one for one in calls if has_implementation(one.op.name, "triton")}
    return found


class Scalar(float):
    """A kernel's float argument, which is a plain float in the interpreter and a tensor on a GPU."""

    def to(self, dtype: Any) -> float:
        return float(self)


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Liger takes rsqrt from libdevice, which the interpreter does not have; what the interpreter itself asks of torch
    is no op of Liger's."""
    from liger_kernel.ops import layer_norm, rms_norm

    execute = GridExecutor.__call__

    def unseen(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return execute(self, *args, **kwargs)

    def rsqrt(x: Any) -> Any:
        return tl.rsqrt(x)  # looked up at the call: the interpreter replaces it at each launch

    with (
        mock.patch.object(GridExecutor, "__call__", unseen),
        mock.patch.object(rms_norm, "rsqrt", rsqrt),
        mock.patch.object(layer_norm, "rsqrt", rsqrt),
    ):
        yield


def liger(op: str, memory: Memory, args: tuple) -> Callable[[], Any] | None:
    """Liger's kernel for the same result, where it has one and is installed."""
    if op.removesuffix("_backward") not in ("rms_norm", "layer_norm") or not importlib.util.find_spec("liger_kernel"):
        return None
    from liger_kernel.ops import layer_norm, rms_norm
    from liger_kernel.ops.utils import calculate_settings

    if op == "rms_norm":
        return lambda: rms_norm.rms_norm_forward(args[0], args[1], Scalar(1e-6), Scalar(0), "llama", True)
    if op == "layer_norm":
        return lambda: layer_norm.layer_norm_forward(args[0], args[1], args[2], Scalar(1e-6))
    grad_y, x, weight, *statistics = (t.view(-1) if isinstance(t, Tensor) and t.shape[-1] == ROWS else t for t in args)
    x = x.view(ROWS, -1)
    if op == "layer_norm_backward":
        return lambda: layer_norm.layer_norm_backward(grad_y, x, weight, weight, *statistics[:2])
    settings = calculate_settings(x.shape[1])
    casting = rms_norm._CASTING_MODE_LLAMA.value
    return lambda: rms_norm.rms_norm_backward(
        grad_y, x, weight, statistics[0], Scalar(0), casting, *settings, False, True
    )


def measure(op: str, C: int) -> dict[str, float]:
    """Bytes over the floor: activations, parameters and partial rows, eager's activations and Liger's."""
    one, memory = cases(C)[op], Memory()
    floor = sum(t.numel() * t.element_size() for t in one.moved if isinstance(t, Tensor) and t.numel() >= ROWS * C)
    args = tuple(memory.place(a) if isinstance(a, Tensor) else a for a in one.raw_args)
    with counting() as moved:
        run(memory, op, *args)
    storages = [storage for storage, _ in memory.storages]
    # a row per token: activations, and the statistics; partial rows [sums, programs, C] are float32 and no rows of x
    tokens = [
        s for s, n in memory.storages if n == ROWS or (n in (ROWS * C, 4 * ROWS * C) and s.dtype != torch.float32)
    ]
    activations, everything = moved.within(tokens), moved.total()
    assert moved.within(storages) + 4 * ROWS * 8 >= everything, "some bytes are not in the buffers known"
    eager = EagerBytes(ROWS * C)
    with eager:
        call(op, "reference", *args)
    row = {
        "activations": activations / floor,
        "parameters and partials": (everything - activations) / floor,
        "eager": eager.bytes / floor,
    }
    theirs = liger(op, memory, args)
    if theirs is not None:
        memory.storages.clear()
        torch_ops = EagerBytes(ROWS * C)
        with memory.allocations(), counting() as moved, torch_ops, as_on_a_gpu():
            kept = theirs()
        given = [t for t in args if isinstance(t, Tensor) and t.numel() in (ROWS, ROWS * C)]
        made = [t for t in torch.utils._pytree.tree_leaves(kept) if isinstance(t, Tensor)]
        made = [t for t in made if t.numel() in (ROWS, ROWS * C)]
        row["Liger"] = (moved.within(given + made) + torch_ops.bytes) / floor
    return {name: round(value, 4) for name, value in row.items()}


def measure_attention(tokens: int, rows: int = 128) -> dict[str, float]:
    """Forward and backward with tiles of `rows` rows, one head of D = 64: how often each tensor is read or written."""
    memory, config = Memory(), AttentionConfig(rows, 64, 4, 1)
    q, k, v, grad_out, *grads = (memory.place(torch.randn(1, tokens, 1, 64).bfloat16()) for _ in range(7))
    one = q.numel() * 2
    with mock.patch.object(attention_configs, "attention_config", return_value=config):
        with counting() as forward:
            out, lse = run(memory, "attention", q, k, v, 0.125, *[None] * 4)
        with counting() as backward:
            run(memory, "attention_backward", grad_out, q, k, v, out, lse, 0.125, *[None] * 4, *grads)
    row = {
        "forward, once each": forward.within([q, out]) / (2 * one),
        "forward, K and V": forward.within([k, v]) / (2 * one),
        "forward over its floor": forward.total() / (4 * one),
        "backward, once each": backward.within([out, *grads]) / (4 * one),
        "backward, Q": backward.within([q]) / one,
        "backward, grad_out": backward.within([grad_out]) / one,
        "backward, K and V": backward.within([k, v]) / (2 * one),
        "backward over its floor": backward.total() / (8 * one),
    }
    return {name: round(value, 4) for name, value in row.items()}


def measure_linear(rows: int, K: int, N: int) -> dict[str, float]:
    """The GEMM with GELU and its pre-activation, and with LayerScale and the residual: times each tensor is moved."""
    memory = Memory()
    x, weight = (memory.place(torch.randn(s, K).bfloat16()) for s in (rows, N))
    vector, residual = (memory.place(torch.randn(s).bfloat16()) for s in ((N,), (rows, N)))
    once = rows * N * 2
    with counting() as gelu:
        y, z = run(memory, "linear_gelu", x, weight, vector, True, backend="triton_gemm")
    with counting() as added:
        (out,) = run(memory, "linear_layer_scale", x, weight, vector, vector, residual, backend="triton_gemm")
    row = {
        "x": gelu.within([x]) / (2 * x.numel()),
        "weight": gelu.within([weight]) / (2 * weight.numel()),
        "y and pre-activation": gelu.within([y, z]) / (2 * once),
        "residual and its sum": added.within([residual, out]) / (2 * once),
    }
    return {name: round(value, 4) for name, value in row.items()}


LINEAR = ((257, 1024, 4096), (257, 4096, 1024), (257, 3200, 3200))


def linear_name(rows: int, K: int, N: int) -> str:
    return f"linear, {rows} rows, {K} to {N}"


ATTENTION = ((257, 128), (1025, 64), (1025, 128), (1025, 256))


def attention_name(tokens: int, rows: int) -> str:
    return f"attention, {tokens} tokens, {rows} rows a tile"


def measure_all() -> dict[str, dict[str, float]]:
    rows = {f"{op}, C = {C}": measure(op, C) for C in (1024, 3200) for op in cases(C)}
    rows |= {linear_name(*case): measure_linear(*case) for case in LINEAR}
    return rows | {attention_name(*case): measure_attention(*case) for case in ATTENTION}


def table(rows: dict[str, dict[str, float]]) -> str:
    """The counts as Markdown."""
    lines = [f"| op | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    apart = ("linear, ", "attention, ")
    for name, row in rows.items():
        if not name.startswith(apart):
            cells = [f"{row[c]:.3f}" if c in row else "" for c in COLUMNS]
            op, _, channels = name.partition(",")
            lines.append(f"| `{op}`,{channels} | {' | '.join(cells)} |")
    for prefix in apart:
        group = {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
        names = list(next(iter(group.values())))
        lines += ["", f"| {prefix[:-2]} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {name} | {' | '.join(f'{row[n]:.2f}' for n in names)} |" for name, row in group.items()]
    return "\n".join(lines)


def document(rows: dict[str, dict[str, float]]) -> str:
    """docs/lower-bounds.md with the table of `rows` in its place."""
    return replace_section(DOC.read_text(), DOC.name, START, END, table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.triton.interpreted.byte_count", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write the budget and the table in the documentation")
    update = parser.parse_args().update
    torch.manual_seed(0)
    rows = measure_all()
    print(table(rows))
    if update and not any("Liger" in row for row in rows.values()):
        parser.error("--update needs Liger's column: pip install --no-deps liger-kernel")
    if update:
        BUDGET.write_text(json.dumps(rows, indent=1) + "\n")
        DOC.write_text(document(rows))


if __name__ == "__main__":
    interpreter.mend()
    main()
