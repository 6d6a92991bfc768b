"""Pictures of features."""

import pytest
import torch

from internvit.data.pca import pca_map


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1)])
def test_a_picture_of_few_patches_is_finite(grid) -> None:
    picture = pca_map(torch.randn(1 + grid[0] * grid[1], 8), grid)
    assert picture.shape == (*grid, 3)
    assert picture.isfinite().all()
