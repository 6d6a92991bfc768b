"""Image files and a small tower for tests of extraction."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from internvit import InternViT, InternViTConfig
from tests.support.models import random_weights

SIZES = ((28, 28), (28, 42), (56, 28), (42, 42))
TINY = InternViTConfig(image_size=56, hidden_size=64, num_attention_heads=2, num_hidden_layers=3, intermediate_size=96)


def write_photos(
    folder: Path, count: int, seed: int, sizes: Sequence[tuple[int, int]] = SIZES, broken: Iterable[int] = ()
) -> list[Path]:
    """PNGs of random pixels, one size after the other; the numbers in `broken` are damaged in several ways."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    paths = [folder / f"{i:06d}.png" for i in range(count)]
    for i, path in enumerate(paths):
        pixels = random.integers(0, 256, (*sizes[i % len(sizes)], 3), np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)
    for i in broken:
        data = paths[i].read_bytes()
        paths[i].write_bytes((b"no image", b"", data[: len(data) // 2])[i % 3])
    return paths


def save_tower(folder: Path, config: InternViTConfig = TINY) -> Path:
    """A checkpoint with random weights."""
    model = InternViT(config)
    random_weights(model)
    return model.save_pretrained(folder)
