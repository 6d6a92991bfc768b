"""Pictures of features."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from internvit import InternViT
from internvit.data import pca
from internvit.data.extract import extract
from internvit.data.pca import draw_pca, pca_map
from tests.support.models import random_weights
from tests.support.photos import TINY


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1)])
def test_a_picture_of_few_patches_is_finite(grid) -> None:
    picture = pca_map(torch.randn(1 + grid[0] * grid[1], 8), grid)
    assert picture.shape == (*grid, 3)
    assert picture.isfinite().all()


@pytest.mark.parametrize(
    ("layers", "drawn", "title"),
    [((2, 10), "10", ["block 10"]), ((10, 2), "10", ["block 10"]), ((-1, -3), "-1", ["block 11"]), (None, "last", [])],
)
def test_the_last_block_is_drawn_by_its_number(tmp_path, seed, monkeypatch, layers, drawn, title) -> None:
    """Names in the file are in the order of their letters: ":2" comes after ":10", and ":-3" after ":-1"."""
    model = InternViT(TINY.replace(num_hidden_layers=12)).eval()
    random_weights(model)
    path, out = tmp_path / "a.png", tmp_path / "out.safetensors"
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)).save(path)
    extract(model, [path], out, (28, 28), layers=layers)
    seen = []
    monkeypatch.setattr(pca, "draw_pca_columns", lambda *arguments: seen.append(arguments))
    assert draw_pca(tmp_path / "pca.png", out, [path], (28, 28), 14) == 1
    with safe_open(out, "pt") as file:
        assert torch.equal(seen[0][2][0][0], file.get_tensor(f"{path}:{drawn}"))
    assert seen[0][-1] == title
