"""Rounding a Linear's weight so that its columns make up for each other's errors (GPTQ).

    minimise  E |(W_q - W) x|^2 = tr((W_q - W) H (W_q - W)^T),  H = E[x x^T]

A column is rounded to the nearest values of its grid, and its error goes to the columns that are not rounded yet, as
the Cholesky factor of H^-1 distributes it; columns with the largest H_jj come first.

Source: Frantar et al., arXiv 2210.17323; IST-DASLab/gptq gptq.py.
"""

from typing import Protocol

import torch
from torch import Tensor

_DAMPING = 0.01  # of the mean of H's diagonal: without it inputs that hardly vary would get weights of any size
_BLOCK = 128  # columns whose errors reach the columns after them in one product


class Grid(Protocol):
    """The values that a weight [M, K] may take."""

    def nearest(self, column: Tensor, index: int) -> Tensor:
        """The values nearest to a column [M], the one of that index."""


class BFloat16Grid:
    """All bfloat16 numbers."""

    def nearest(self, column: Tensor, index: int) -> Tensor:
        return column.bfloat16().to(column.dtype)


class Int8Grid:
    """-127 to 127 times a scale for each row, such that the row's bfloat16 values have the same scale and integers.

        scale = m / 127,  m = bfloat16(max |w|) of the row

    The row's largest weight becomes m. So `per_token_quant` gets m and the scale from bfloat16(scale * integer),
    and from each value its integer: an error of 2^-9 of at most 127 is below a half.
    """

    def __init__(self, weight: Tensor) -> None:
        largest, self.place = weight.abs().max(1)
        self.largest = largest.bfloat16()
        self.sign = weight.gather(1, self.place.unsqueeze(1)).squeeze(1).sign()
        scale = self.largest.float() / torch.full_like(largest, 127.0, dtype=torch.float32)
        self.scale = torch.where(scale > 0, scale, 1.0).to(weight.dtype)

    def nearest(self, column: Tensor, index: int) -> Tensor:
        whole = (column / self.scale).round().clamp(-127, 127)
        return torch.where(self.place == index, 127 * self.sign, whole) * self.scale


def inverse_factor(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of damped second moments [K, K]."""
    damped = moments.clone()
    diagonal = damped.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp_min(torch.finfo(moments.dtype).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def round_weight(weight: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """The weight on a grid with the least error of the outputs that a column-by-column choice reaches.

    Args:
        weight: [M, K], float64.
        moments: [K, K], float64, the mean of x x^T over the inputs; a column of ones in x makes its weight the bias.
        grid: of the values; its indices are columns of `weight`.

    Returns:
        [M, K], float64, values of the grid.
    """
    order = moments.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(moments[order][:, order])
    rest, rounded = weight[:, order], torch.empty_like(weight)
    columns = order.tolist()
    for start in range(0, len(columns), _BLOCK):
        stop = min(start + _BLOCK, len(columns))
        block = rest[:, start:stop].clone()
        errors = torch.empty_like(block)
        for i in range(stop - start):
            row = factor[start + i, start + i : stop]
            rounded[:, columns[start + i]] = value = grid.nearest(block[:, i], columns[start + i])
            errors[:, i] = (block[:, i] - value) / row[0]
            block[:, i:] -= errors[:, i : i + 1] * row
        rest[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded
