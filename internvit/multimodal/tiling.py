"""InternVL's dynamic tiling (version 1.5 and later): an image as a grid of square tiles and a thumbnail.

Of all grids of at most `max_tiles` tiles, the one with the nearest aspect ratio is taken. Among equally near grids the
larger wins if the image has more than half of its pixels.
"""

import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.images import MEAN, STD, open_photo, to_rgb


@functools.lru_cache(maxsize=32)
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows), fewest tiles first, then fewest columns."""
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    return tuple(sorted(grids, key=math.prod))


def best_grid(
    height: int, width: int, image_size: int = 448, min_tiles: int = 1, max_tiles: int = 12
) -> tuple[int, int]:
    """The (rows, columns) of tiles for an image.

    Args:
        height, width: of the image, in pixels.
        image_size: side of a tile.
        min_tiles, max_tiles: bounds on rows * columns (InternVL: 12, in training up to 40).

    Raises:
        ValueError: an empty image, or bounds that allow nothing.

    Source: dynamic_preprocess and find_closest_aspect_ratio in OpenGVLab's InternVL; transformers'
        get_optimal_tiled_canvas.
    """
    if height < 1 or width < 1:
        raise ValueError(f"best_grid: height and width must be at least 1, got {height} and {width}")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"best_grid: expected 1 <= min_tiles <= max_tiles, got {min_tiles} and {max_tiles}")
    best, nearest = (1, 1), math.inf
    for columns, rows in _grids(min_tiles, max_tiles):
        distance = abs(width / height - columns / rows)
        large = width * height > 0.5 * image_size * image_size * columns * rows
        if distance < nearest or (distance == nearest and large):
            best, nearest = (columns, rows), distance
    return best[1], best[0]


def tile_image(
    image: Any,
    image_size: int = 448,
    min_tiles: int = 1,
    max_tiles: int = 12,
    thumbnail: bool = True,
    normalize: bool = True,
) -> Tensor:
    """The tiles of an image as one batch for the vision tower.

    Args:
        image: the path of an image file, which its EXIF turns upright; a PIL image, taken as it is; or 8-bit RGB as a
            numpy array [height, width, 3] or a tensor [3, height, width]; any strides. Transparency is laid over
            white; InternVL's own loading, convert("RGB"), drops it and shows the colours behind.
        image_size: side of a tile.
        min_tiles, max_tiles: bounds on the number of tiles, the thumbnail not counted.
        thumbnail: append the whole image as one more tile, if there are several.
        normalize: to float32 by ImageNet's mean and standard deviation; else uint8.

    Returns:
        [tiles, 3, image_size, image_size], row by row, the thumbnail last.

    Raises:
        ValueError: another shape or dtype, or an image file that cannot be read.
        FileNotFoundError: no such file.
    """
    pixels = _rgb(image)
    height, width = pixels.shape[1:]
    rows, columns = best_grid(height, width, image_size, min_tiles, max_tiles)
    resized = _resize(pixels, rows * image_size, columns * image_size)
    tiles = resized.unflatten(2, (columns, image_size)).unflatten(1, (rows, image_size))  # [3, rows, S, columns, S]
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
    if thumbnail and len(tiles) > 1:
        tiles = torch.cat([tiles, _resize(pixels, image_size, image_size)[None]])
    if not normalize:
        return tiles.contiguous()
    mean, std = (torch.tensor(values, dtype=torch.float32, device=tiles.device).view(3, 1, 1) for values in (MEAN, STD))
    return ((tiles.float() / 255 - mean) / std).contiguous()


def _rgb(image: Any) -> Tensor:
    """[3, height, width] uint8."""
    if isinstance(image, (str, os.PathLike)):
        image = open_photo(Path(image))
    if hasattr(image, "convert"):  # PIL
        image = to_rgb(image, "tile_image")
    if not isinstance(image, Tensor):
        array = np.array(image)  # a copy: PyTorch takes neither negative strides nor read-only memory
        if array.dtype != np.uint8:
            raise ValueError(f"tile_image: expected 8-bit RGB, got {type(image).__name__} of dtype {array.dtype}")
        image = torch.from_numpy(array)
        image = image.permute(2, 0, 1) if image.dim() == 3 else image
    if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8 or 0 in image.shape:
        raise ValueError(
            f"tile_image: expected 8-bit RGB: a path, a PIL image, an array [height, width, 3] or a tensor "
            f"[3, height, width], got shape {list(image.shape)} and {image.dtype}"
        )
    return image


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialias in 8 bit: torchvision's to the bit, PIL's to two levels of 255 on photographs."""
    return F.interpolate(pixels[None], size=(height, width), mode="bicubic", antialias=True)[0]
