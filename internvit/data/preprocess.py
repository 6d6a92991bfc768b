"""Any form in which an image comes, as 8-bit pixels for the tower."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from internvit.data.storage import read_bytes
from internvit.images import decode_photo, resize_photo, to_rgb
from internvit.multimodal.tiling import tile_image

# An image that keeps its size is scaled down to this many patches: 896 x 896 pixels in patches of 14.
MAX_PATCHES = 4096


@dataclass(frozen=True)
class Preprocessor:
    """Decodes, resizes and tiles; what runs on CPU workers beside the model.

    Attributes:
        patch_size: of the model.
        size: (height, width); None keeps each image's size, rounded to whole patches, at most `MAX_PATCHES`.
        tiles: at most so many square tiles of `size` an image, as InternVL cuts them, and a thumbnail; 0 for none.
        multiple: of patches that an image's own height and width are rounded to, as a connector's pixel shuffle asks.
    """

    patch_size: int
    size: tuple[int, int] | None
    tiles: int = 0
    multiple: int = 1

    def __call__(self, value: Any, name: str = "image") -> np.ndarray:
        """Pixels of one image.

        Args:
            value: encoded bytes; a path or URL; {"bytes": ..., "path": ...} as Hugging Face's datasets have it; 8-bit
                pixels [height, width], [height, width, 3] or [height, width, 4]; or a PIL image. Paths and bytes are
                turned upright by their EXIF; a PIL image is taken as it is, as torchvision and transformers do.
            name: of the image, for messages.

        Returns:
            uint8 [tiles, height, width, 3], one tile where images are not tiled.

        Raises:
            ValueError: not an image, or a damaged one; the message names it.
            FileNotFoundError: no such file.
        """
        photo = _photo(value, name)
        if self.tiles:
            if self.size is None:
                raise ValueError("size: expected the size of a tile, got None")
            tiles = tile_image(photo, self.size[0], max_tiles=self.tiles, normalize=False)
            return tiles.permute(0, 2, 3, 1).contiguous().numpy()
        return resize_photo(photo, self.size or self._own_size(photo.height, photo.width))[None]

    def _own_size(self, height: int, width: int) -> tuple[int, int]:
        unit, most = self.patch_size * self.multiple, MAX_PATCHES // self.multiple**2
        scale = min(1.0, (most * unit * unit / (height * width)) ** 0.5)
        # Of a long strip, whose short side is rounded up to one unit, the long side gives way.
        rows = min(max(1, round(height * scale / unit)), most)
        return rows * unit, min(max(1, round(width * scale / unit)), most // rows) * unit


def _photo(value: Any, name: str) -> Any:
    """An RGB PIL image; of a path and bytes upright."""
    from PIL import Image

    if isinstance(value, Mapping):
        path = value.get("path")
        value, name = (path if value.get("bytes") is None else value["bytes"]), str(path or name)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_photo(bytes(value), name)
    if isinstance(value, str | os.PathLike):
        return decode_photo(read_bytes(str(value)), Path(value))
    if isinstance(value, np.ndarray):
        shape = value.shape
        if value.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))) or 0 in shape:
            raise ValueError(
                f"{name}: expected 8-bit pixels [height, width], [height, width, 3] or [height, width, 4], got "
                f"{value.dtype} {list(shape)}"
            )
        value = Image.fromarray(np.ascontiguousarray(value))
    if isinstance(value, Image.Image):
        return to_rgb(value, name)
    raise ValueError(f"{name}: expected image bytes, a path or 8-bit pixels, got {type(value).__name__}")
