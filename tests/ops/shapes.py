"""The shapes and data of the numerics tests: each value of each list is covered, pairs by a fixed table."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from internvit.numerics import DISTRIBUTIONS, relative_error

WIDTHS = (40, 384, 1024, 3200)
ROWS = (1, 3, 257, 1025)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pooled(rows: int) -> int:
    """16 rows or a few more, for a norm to be judged on, as the calls of `rows` rows that `in_draws` makes of them.

    A row errs as a whole with its statistic: of one row with massive channels in float32, one call in 300 errs by more
    than the two roundings that are allowed.
    """
    return rows * -(-16 // rows)


def in_draws(x: Tensor, rows: int, dim: int = 0) -> list[Tensor]:
    """x cut along `dim` into calls of `rows` rows, each in memory of its own."""
    return [part.contiguous() for part in x.split(rows, dim)]


def pooled_gradients(draw: Callable[[], Iterable[Sequence[Tensor]]]) -> Iterator[tuple[Tensor, ...]]:
    """Of each gradient, what 16 calls of `draw` give stacked: actual, truth and eager, to be judged as one.

    With massive channels a parameter's gradient is three sums and little else: of one draw of 514 rows the ratio to
    eager's error scatters from 0.1 to 1.4 of the bound.
    """
    ways = zip(*(draw() for _ in range(16)), strict=True)
    return zip(*([torch.stack(t) for t in zip(*way, strict=True)] for way in ways), strict=True)


def check_gradients(draw: Callable[[], Iterable[Sequence[Tensor]]]) -> None:
    """Pooled float32 gradients err at most twice as much as eager's."""
    for number, (actual, truth, eager) in enumerate(pooled_gradients(draw)):
        assert relative_error(actual, truth) <= max(2 * relative_error(eager, truth), 2.4e-7), f"gradient {number}"


def three_gradients(
    op: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> tuple[Sequence[Tensor], ...]:
    """The gradients of all `inputs`: the op's, those of the plain formula in float64, and eager's."""
    inputs = [t.requires_grad_() for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    return (
        torch.autograd.grad(op(*inputs), inputs, grad),
        torch.autograd.grad(plain(*wide), wide, grad.double()),
        torch.autograd.grad(plain(*inputs), inputs, grad),
    )


def mean_over_std(x: Tensor) -> float:
    """The largest |mean| / standard deviation of x's rows: how ill-conditioned LayerNorm is on it."""
    x = x.double()
    return (x.mean(-1).abs() / x.std(-1)).max().item()


def norm_table() -> list[tuple[int, int, str, torch.dtype]]:
    """(rows, width, distribution, dtype): every distribution with every dtype and width, rows in turn."""
    table = []
    for i, width in enumerate(WIDTHS):
        for j, distribution in enumerate(DISTRIBUTIONS):
            for k, dtype in enumerate(DTYPES):
                table.append((ROWS[(i + j + k) % len(ROWS)], width, distribution, dtype))
    return table


norm_shapes = pytest.mark.parametrize(
    ("rows", "width", "distribution", "dtype"),
    norm_table(),
    ids=[f"{r}x{c}-{d}-{str(t).removeprefix('torch.')}" for r, c, d, t in norm_table()],
)
