"""Cases, guarded memory and the comparison that all interpreter tests share."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from internvit import numerics
from internvit.kernels.common.rows import RowConfig, persistent_programs
from internvit.kernels.common.target import INTERPRETER
from tests.support.implementations import call

GUARD = 64  # elements on either side of every buffer; they keep 16-byte alignment
MARK = 77  # of integers, which have no NaN
DTYPES = ("float32", "bfloat16", "float16")
STRIDES = ("contiguous", "packed", "sliced", "transposed")
ROWS = (1, 3, 257, 1025)
CHANNELS = (40, 384, 1024, 3200)


def pairwise(factors: dict[str, tuple], allowed: Callable[[dict], bool], has: list[dict[str, Any]]) -> list[dict]:
    """A short fixed table in which each allowed pair of values of any two factors meets that `has` lacks (greedy)."""
    pairs = itertools.combinations(factors, 2)
    wanted = [{a: x, b: y} for a, b in pairs for x in factors[a] for y in factors[b]]
    table: list[dict[str, Any]] = []

    def covers(case: dict[str, Any], pair: dict[str, Any]) -> bool:
        return all(case.get(name, pair) == value for name, value in pair.items())

    wanted = [p for p in wanted if not any(covers(case, p) for case in has)]
    while wanted:
        case = dict(wanted[0])
        for name, values in factors.items():
            if name not in case:
                candidates = [{**case, name: v} for v in values if allowed({**case, name: v})]
                case = max(candidates, key=lambda c: sum(covers(c, p) for p in wanted), default=case)
        if len(case) == len(factors) and allowed(case):
            table.append({name: case[name] for name in factors})
            wanted = [p for p in wanted if not covers(case, p)]
        else:
            wanted.pop(0)
    return table


def parametrize(
    full: tuple[str, ...], allowed: Callable[[dict], bool] = lambda case: True, **factors: tuple
) -> Callable:
    """Each pair of values of any two factors; as slow tests the product of the factors in `full`, the others in turns.

    A run has a quarter of the pairs, by its seed, and every value of each factor. `allowed` says what may be in it;
    pairs that take the interpreter too long for that are slow tests as well.
    """
    table = pairwise(factors, allowed, [])
    long = pairwise(factors, lambda case: True, table)
    others = [{k: v for k, v in case.items() if k not in full} for case in table]
    rest = [
        {**dict(zip(full, values, strict=True)), **others[i % len(others)]}
        for i, values in enumerate(itertools.product(*(factors[name] for name in full)))
    ]
    slow = [*long, *(c for c in rest if c not in table and c not in long)]
    cases = [pytest.param(c, id=_id(c)) for c in table]
    cases += [pytest.param(c, id=_id(c), marks=pytest.mark.slow) for c in slow]
    return lambda test: pytest.mark.sampled(4)(pytest.mark.parametrize("case", cases)(test))


def fits(case: dict[str, Any]) -> bool:
    """1025 rows of 3200 channels take the interpreter 3 to 6 s."""
    rows, channels = case.get("rows", case.get("tokens", 1)), case.get("channels", 1)
    return rows * channels < 2_000_000


def _id(case: dict[str, Any]) -> str:
    return "-".join(f"{k}:{v}" for k, v in case.items())


def generator(case: dict[str, Any]) -> torch.Generator:
    return torch.Generator().manual_seed(sum(ord(c) * (i + 1) for i, c in enumerate(_id(case))))


class Memory:
    """Hands out buffers between guard bands and, at the end, knows whether a kernel wrote on a band."""

    def __init__(self) -> None:
        self.storages: list[tuple[Tensor, int]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel()
        storage = torch.full((count + 2 * GUARD,), float("nan") if dtype.is_floating_point else MARK, dtype=dtype)
        self.storages.append((storage, count))
        return storage[GUARD : GUARD + count].view(shape)

    def place(self, x: Tensor, strides: str = "contiguous") -> Tensor:
        """A copy of x [..., C] with the stride pattern asked for, inside guarded memory."""
        if strides == "packed":  # the middle third of each row, as k in a packed qkv
            wide = self.empty((*x.shape[:-1], 3, x.shape[-1]), x.dtype)
            view = wide.select(-2, 1)
        elif strides == "sliced" and x.dim() > 1:  # without the class token: no single row stride
            longer = list(x.shape)
            longer[-2] += 1
            view = self.empty(tuple(longer), x.dtype).narrow(-2, 1, x.shape[-2])
        elif strides == "transposed" and x.dim() > 1:
            view = self.empty((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype).transpose(-1, -2)
        else:
            view = self.empty(tuple(x.shape), x.dtype)
        return view.copy_(x)

    def check_guards(self) -> None:
        for storage, count in self.storages:
            bands = torch.cat([storage[:GUARD], storage[GUARD + count :]])
            kept = bands.isnan() if bands.is_floating_point() else bands == MARK
            assert kept.all(), f"a kernel wrote outside a buffer of {count} elements"

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        """Inside, what ops allocate is guarded and starts as NaN."""
        new_empty, empty_like, empty_strided = torch.Tensor.new_empty, torch.empty_like, torch.empty_strided

        def guarded_new_empty(t: Tensor, *shape: Any, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
            if isinstance(shape[0], (tuple, list)):
                shape = tuple(shape[0])
            return self.empty(shape, dtype or t.dtype)

        def guarded_empty_like(t: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
            return self.empty(tuple(t.shape), dtype or t.dtype)

        def guarded_empty_strided(shape: tuple[int, ...], strides: Any, dtype: torch.dtype, device: Any) -> Tensor:
            return self.empty(tuple(shape), dtype)

        torch.Tensor.new_empty, torch.empty_like = guarded_new_empty, guarded_empty_like  # type: ignore[method-assign]
        torch.empty_strided = guarded_empty_strided  # type: ignore[assignment]
        try:
            yield
        finally:
            del torch.Tensor.new_empty
            torch.empty_like, torch.empty_strided = empty_like, empty_strided
        assert torch.Tensor.new_empty is new_empty


def run(memory: Memory, op: str, *args: Any, backend: str = "triton") -> tuple[Tensor, ...]:
    """The op's kernels on guarded, poisoned memory."""
    with memory.allocations():
        outputs = call(op, backend, *args)
    memory.check_guards()
    return tuple(torch.empty(0) if t is None else t for t in (outputs if isinstance(outputs, tuple) else (outputs,)))


def _as(dtype: torch.dtype, value: Any) -> Any:
    return value.detach().to(dtype) if isinstance(value, Tensor) else dtype if isinstance(value, torch.dtype) else value


def reference(op: str, dtype: torch.dtype, *args: Any) -> tuple[Tensor, ...]:
    """The reference in `dtype` arithmetic of the same rounded inputs."""
    outputs = call(op, "reference", *(_as(dtype, a) for a in args))
    return outputs if isinstance(outputs, tuple) else (outputs,)


def agree(
    kind: str,
    names: str,
    actual: tuple,
    truth: tuple,
    eager: tuple,
    terms: Tensor | None = None,
    roundings: float = 4,
    addends: int = 1,
    summed: dict[str, Tensor] | None = None,
) -> None:
    """Every output keeps the contract: 'norm' element by element, 'sum' in relative error (sums cancel).

    `terms` and `roundings` are `numerics.norm_violations`'s. `addends` is how many numbers a float32 sum over rows adds
    one after the other: each addition rounds, and n errors of random signs add up to about sqrt(n) of them, where
    eager's pairwise sum has log2(n); at least 4, for of few channels that count eager's error may be nothing by luck.
    `summed` has the terms [rows, C] of such a sum by its name: its additions round in proportion to their root sum of
    squares, the size of a partial sum, and of three massive channels all may end near 0 (measured: 2.7 times nearer).
    """
    failures = []
    for name, a, t, e in zip(names.split(), actual, truth, eager, strict=True):
        if t is None or t.numel() == 0 or a.numel() == 0:
            assert a.numel() == 0 or t is None or t.shape == a.shape, f"{name}: shape {a.shape}, expected {t.shape}"
            continue
        if kind == "norm" or a.dtype == torch.float32:
            found = numerics.norm_violations(a, t, e, terms, roundings=roundings)
            allowed = max(4.0, addends**0.5) * torch.finfo(torch.float32).eps
            if summed and name in summed:
                allowed *= max(1.0, (summed[name].norm() / t.norm().clamp_min(torch.finfo(t.dtype).tiny)).item())
            if kind == "sum" and numerics.relative_error(a, t) <= allowed:
                found = []
        else:
            found = numerics.product_violations(a, t, t.to(a.dtype))
        failures += [f"{name}: {f}" for f in found]
    assert not failures, "; ".join(failures)


def addends(rows: int, channels: int) -> int:
    """How many rows a program of the interpreter's target adds one after the other."""
    choice = RowConfig.rule(channels)
    return -(-rows // (choice.rows * persistent_programs(rows, choice, INTERPRETER)))


def check_statistics(actual: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> None:
    """rstd within 4 eps of itself (0.5 for each of root, quotient and eps, the squares' sum; measured: 2.2), mean (if
    any) within eps of its own size plus the row's spread (measured: 0.6)."""
    eps = torch.finfo(torch.float32).eps
    rstd = truth[-1]
    assert ((actual[-1] - rstd).abs() <= 4 * eps * rstd).all()
    if truth[0].numel() and len(truth) == 2:
        mean = truth[0]
        assert ((actual[0] - mean).abs() <= eps * (mean.abs() + 1 / rstd)).all()


def skip_unless_numpy_rows_are_alike() -> None:
    """For tests of the bits of a row at another place: the interpreter multiplies by numpy."""
    a, b = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)
    if not all(np.array_equal(np.roll(a, shift, 0) @ b, np.roll(a @ b, shift, 0)) for shift in range(1, 64)):
        pytest.skip("numpy's matmul, by which the interpreter multiplies, sums a row by its place on this machine")
