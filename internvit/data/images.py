"""Image files as pixels: what people's folders hold, and what InternViT was trained on.

Every file becomes an upright RGB photograph: EXIF rotation is applied, palettes are resolved, transparency is laid over
white, grey and 16-bit images are scaled to 8 bits. Pixels are resized (bicubic) to the wanted size, scaled to [0, 1]
and normalised by ImageNet's mean and standard deviation, as all published InternViTs expect.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_RASTER = ("avif", "bmp", "dib", "gif", "ico", "jfif", "jp2", "jpe", "jpeg", "jpg", "png", "qoi", "tga", "tif", "tiff")
_PORTABLE = ("pbm", "pgm", "pnm", "ppm", "webp")
SUFFIXES = frozenset(f".{suffix}" for suffix in (*_RASTER, *_PORTABLE))


def find_images(patterns: Iterable[str | Path]) -> list[Path]:
    """Image files named by paths, folders (searched whole) and glob patterns; sorted within each, none twice.

    Raises:
        FileNotFoundError: a pattern that matches nothing, by name.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            matches = [path]
        else:
            root = Path(path.anchor) if path.is_absolute() else Path()
            relative = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
            matches = sorted(p for p in root.glob(relative) if p.is_file())
        if not matches:
            raise FileNotFoundError(f"no image at {pattern}")
        found.update(dict.fromkeys(matches))
    return list(found)


def open_photo(path: str | Path) -> "Image.Image":
    """The file as an upright 8-bit RGB image.

    Raises:
        ValueError: no image, a broken one, or one whose values have no known range; the message names the file.
        FileNotFoundError: no such file.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not an image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: broken image: {error}") from error
    if image.mode.startswith("I"):
        image = _eight_bits(np.asarray(image), path)
    elif image.mode == "F":
        raise ValueError(f"{path}: float values have no known range; save it as 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, path: str | Path) -> "Image.Image":
    """Integers up to 65535 as 8 bits; 257 = 65535 / 255 steps of 16 bits are one of 8."""
    from PIL import Image

    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(f"{path}: values up to {values.max()} have no known range; save it as 8 or 16 bits")
    return Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))


def to_pixels(image: "Image.Image", size: tuple[int, int]) -> Tensor:
    """Normalised pixels [3, height, width] float32 of an RGB image, resized to size = (height, width)."""
    from PIL import Image

    resized = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return ((pixels - mean) / std).contiguous()


def load_pixels(path: str | Path, size: tuple[int, int]) -> Tensor:
    """`to_pixels` of `open_photo`."""
    return to_pixels(open_photo(path), size)
