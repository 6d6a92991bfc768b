"""Image files as pixels.

Every file becomes an upright RGB photograph: EXIF rotation is applied, palettes are resolved, transparency is laid over
white, grey and 16-bit images are scaled to 8 bits. Pixels are resized (bicubic) to the wanted size, scaled to [0, 1]
and normalised by ImageNet's mean and standard deviation, as all published InternViTs expect.
"""

import io
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_READABLE = (
    "apng avif avifs bmp dib gif icns ico j2c j2k jfif jp2 jpc jpe jpeg jpf jpg jpx mpo pbm pcx pgm png pnm ppm psd "
    "qoi sgi tga tif tiff webp"
)
# Pillow needs a plugin for these; a folder's search returns them all the same, so that they are reported.
_OTHERS = "exr hdr heic heics heif heifs hif jxl jxr svg wdp"
# Pillow takes a camera's raw file for the small TIFF preview inside it.
_RAW = "3fr arw cr2 cr3 dng erf iiq mef mos mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f"
# Formats without integers of 32 bits: where Pillow says so (mode "I"), they are of 16.
_SIXTEEN_BITS = ("PNG", "PPM")
RAW_SUFFIXES = frozenset(f".{suffix}" for suffix in _RAW.split())
SUFFIXES = frozenset(f".{suffix}" for suffix in f"{_READABLE} {_OTHERS} {_RAW}".split())


def printable(path: str | Path) -> str:
    """A path for messages: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def find_images(patterns: Iterable[str | Path]) -> list[Path]:
    """Image files named by paths, folders (searched recursively) and glob patterns; sorted within each, none twice.

    A folder gives every file with a suffix in `SUFFIXES`, whether or not Pillow can read it, and links to files that
    do not exist: whoever opens them reports them.

    Raises:
        FileNotFoundError: a pattern that matches nothing, by name.
    """
    images: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = (Path(name) for name in walk_files(path))
            matches = sorted(p for p in files if p.suffix.lower() in SUFFIXES and _is_file_or_dangling(p))
        elif path.exists():
            matches = [path]
        else:
            root = Path(path.anchor) if path.is_absolute() else Path()
            relative = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
            matches = sorted(p for p in root.glob(relative) if _is_file_or_dangling(p))
        if not matches:
            raise FileNotFoundError(f"no image at {printable(pattern)}")
        images.update(dict.fromkeys(matches))
    return list(images)


def walk_files(folder: str | Path) -> Iterator[str]:
    """The paths of what lies in a folder and below, but for folders; linked folders are followed.

    One that is reached several ways is listed once, by a way without links if there is one. A link to a folder that it
    lies in is not followed. A folder that cannot be listed is logged.
    """
    seen: set[Path] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        for place, folders, names in os.walk(waiting.pop(0), onerror=_log_unlisted):
            real = Path(place).resolve()
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            below = [Path(place, name) for name in sorted(folders)]
            waiting += [str(path) for path in below if path.is_symlink() and not real.is_relative_to(path.resolve())]
            yield from (os.path.join(place, name) for name in names)


def _log_unlisted(error: OSError) -> None:
    logger.warning("%s: cannot be listed: %s", printable(error.filename), error.strerror or error)


def _is_file_or_dangling(path: Path) -> bool:
    return path.is_file() or (path.is_symlink() and not path.exists())


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file.

    Raises:
        ValueError: a folder, a pipe or a device, or a file that cannot be read; the message names it.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"{printable(path)}: a path has no NUL")
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise ValueError(f"{printable(path)}: not a regular file")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{printable(path)}: no such file") from error
    except OSError as error:
        raise ValueError(f"{printable(path)}: cannot be read: {error.strerror or error}") from error


def open_photo(path: str | Path) -> "Image.Image":
    """The file as an upright 8-bit RGB image.

    Raises:
        ValueError: no image, a damaged one, or one whose values have no known range; the message names the file.
        FileNotFoundError: no such file.
    """
    return decode_photo(read_file(path), path)


def decode_photo(data: bytes, path: str | Path) -> "Image.Image":
    """`open_photo` of bytes that were read from `path`."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    name, suffix = printable(path), Path(path).suffix.lower()
    if suffix in RAW_SUFFIXES:
        raise ValueError(f"{name}: a camera's raw file; convert it to TIFF, PNG or JPEG")
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            image, kind = ImageOps.exif_transpose(file), file.format
    except UnidentifiedImageError as error:
        hint = f"; {suffix} needs a plugin, or another format" if suffix[1:] in _OTHERS.split() else ""
        raise ValueError(f"{name}: not an image that Pillow can read{hint}") from error
    except Exception as error:  # decoders raise RuntimeError, struct.error, MemoryError and more
        raise ValueError(f"{name}: broken image: {str(error) or type(error).__name__}") from error
    return to_rgb(image, name, kind)


def to_rgb(image: "Image.Image", name: str, kind: str | None = None) -> "Image.Image":
    """An image of any mode as 8-bit RGB.

    Args:
        image: as Pillow opened it, or was given it.
        name: of the image, for messages.
        kind: Pillow's name of the format that it comes from, `image.format` by default.

    Raises:
        ValueError: values without a known range; the message begins with `name`.
    """
    from PIL import Image

    if image.mode.startswith("I"):
        wide = image.mode == "I" and (kind or image.format) not in _SIXTEEN_BITS
        image = _eight_bits(np.asarray(image), name, wide)
    elif image.mode == "F":
        raise ValueError(f"{name}: float values have no known range; save it as 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(values: np.ndarray, name: str, wide: bool) -> "Image.Image":
    """Integers up to 65535 as 8 bits; 257 = 65535 / 255 steps of 16 bits are one of 8.

    Values up to 255 in `wide` integers, of 32 bits, are refused: 8 bits as likely as 16.
    """
    from PIL import Image

    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if low < 0 or high > 65535 or (wide and 0 < high < 256):
        raise ValueError(f"{name}: integers from {low} to {high} have no known range; save it as 8 or 16 bits")
    return Image.fromarray((values.astype(np.float32) / 257).round().astype(np.uint8))


def resize_photo(image: "Image.Image", size: tuple[int, int]) -> np.ndarray:
    """8-bit pixels [height, width, 3] of an RGB image, resized (bicubic) to size = (height, width)."""
    from PIL import Image

    return np.array(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def normalize(pixels: Tensor) -> Tensor:
    """8-bit pixels [..., height, width, 3] as float32 [..., 3, height, width] by ImageNet's mean and deviation."""
    scaled = pixels.movedim(-1, -3).float() / 255
    mean, std = (torch.tensor(v, dtype=torch.float32, device=pixels.device).view(3, 1, 1) for v in (MEAN, STD))
    return ((scaled - mean) / std).contiguous()


def to_pixels(image: "Image.Image", size: tuple[int, int]) -> Tensor:
    """Normalised pixels [3, height, width] float32 of an RGB image, resized to size = (height, width)."""
    return normalize(torch.from_numpy(resize_photo(image, size)))


def load_pixels(path: str | Path, size: tuple[int, int]) -> Tensor:
    """`to_pixels` of `open_photo`."""
    return to_pixels(open_photo(path), size)
