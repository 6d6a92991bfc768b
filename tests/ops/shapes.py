"""The shapes and data of the numerics tests: each value of each list is covered, pairs by a fixed table."""

import pytest
import torch
from torch import Tensor

from internvit.contract import DISTRIBUTIONS

WIDTHS = (40, 384, 1024, 3200)
ROWS = (1, 3, 257, 1025)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
