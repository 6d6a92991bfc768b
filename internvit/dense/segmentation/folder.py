"""A folder of images and one of masks as a data set; every file that does not fit is reported.

    images/a.jpg, images/sub/b.png  beside  masks/a.png, masks/sub/b.png

A mask is a PNG of at most 8 bits, grey or with a palette, that holds each pixel's class; 255 is no class. `find_pairs`
opens every file once: a broken image, a mask of another size or with classes that do not exist, and a file without its
partner are errors, or are left out and reported. After that the list is fixed, so that a seed determines the order of
the data.
"""

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internvit.dense.segmentation.heads import IGNORE, check_num_classes
from internvit.images import SUFFIXES, find_images, open_photo, printable, read_file, walk_files

logger = logging.getLogger(__name__)

ON_BROKEN = ("raise", "skip")


class Pair(NamedTuple):
    """An image file and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class FolderPairs:
    """Result of `find_pairs`.

    Attributes:
        pairs: in the order of their names.
        left_out: the files that do not fit, and why.
    """

    pairs: tuple[Pair, ...]
    left_out: dict[Path, str]


def read_mask(path: Path, num_classes: int, reduce_zero_label: bool = False) -> np.ndarray:
    """The classes [H, W] uint8 of a mask file.

    Args:
        path: an image with one channel of 8 bits, or a PNG of 1, 2 or 4, whose values are taken as they are stored.
        num_classes: at most 255; larger values in the mask are an error, except `IGNORE`.
        reduce_zero_label: 0 is no class and the others count from 1, as in ADE20K.

    Raises:
        ValueError: no such image, or a class that does not exist; the message names the file.
        FileNotFoundError: no such file.
    """
    from PIL import Image, UnidentifiedImageError

    check_num_classes(num_classes)
    name, data = printable(path), read_file(path)
    try:
        with Image.open(io.BytesIO(data)) as file:
            file.load()
            mode, classes = file.mode, np.asarray(file)
            scale = _grey_scale(data) if file.format == "PNG" else 1
    except UnidentifiedImageError as error:
        raise ValueError(f"{name}: not an image that Pillow can read") from error
    except Exception as error:  # decoders raise RuntimeError, struct.error, MemoryError and more
        raise ValueError(f"{name}: broken mask: {str(error) or type(error).__name__}") from error
    if mode == "1" and scale == 255:
        classes = classes.astype(np.uint8)  # here Pillow has True for 1
    elif mode not in ("L", "P"):
        raise ValueError(f"{name}: expected a mask of one 8-bit channel (mode L or P), got mode {mode}")
    elif scale > 1:
        classes = classes // scale
    if reduce_zero_label:
        classes = np.where(classes == 0, IGNORE, np.where(classes == IGNORE, IGNORE, classes - 1)).astype(np.uint8)
    unknown = np.setdiff1d(np.unique(classes), [*range(num_classes), IGNORE])
    if unknown.size:
        listed = ", ".join(map(str, unknown[:5]))
        raise ValueError(f"{name}: expected classes from 0 to {num_classes - 1} or {IGNORE}, got {listed}")
    return classes


def _grey_scale(png: bytes) -> int:
    """What Pillow multiplies the values of a PNG by: it stretches grey of 1, 2 and 4 bits to 0 ... 255.

    The file's first chunk, IHDR, has the bits at byte 24 and the kind of colour at byte 25, where 0 is grey.
    """
    bits, colour = png[24], png[25]
    return 255 // (2**bits - 1) if colour == 0 and bits < 8 else 1


def read_pair(pair: Pair, num_classes: int, reduce_zero_label: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """An image [H, W, 3] and its mask [H, W], uint8.

    Raises:
        ValueError: one of them is broken, or their sizes differ; the message names the file.
    """
    image = np.asarray(open_photo(pair.image))
    classes = read_mask(pair.mask, num_classes, reduce_zero_label)
    if image.shape[:2] != classes.shape:
        (h, w), (mask_h, mask_w) = image.shape[:2], classes.shape
        raise ValueError(
            f"{printable(pair.mask)}: expected its image's size {h}x{w} (height x width), got {mask_h}x{mask_w}"
        )
    return image, classes


def _same(pairs: Sequence[Pair]) -> Iterable[Pair]:
    return pairs


def find_pairs(
    images: Path,
    masks: Path,
    num_classes: int,
    on_broken: str = "raise",
    reduce_zero_label: bool = False,
    progress: Callable[[Sequence[Pair]], Iterable[Pair]] = _same,
) -> FolderPairs:
    """The images of a folder with their masks; every file is read once.

    Args:
        images, masks: folders; a mask has its image's name with ".png", in the same subfolder.
        num_classes, reduce_zero_label: see `read_mask`.
        on_broken: "raise" stops at the first file that does not fit; "skip" leaves it out and logs its name, the reason
            and the number of such files.
        progress: wraps the reading, as tqdm does.

    Raises:
        ValueError: a file that does not fit, with "raise"; no pair at all; two images for one mask; num_classes over
            255.
        FileNotFoundError: no such folder, or no image in it.
    """
    if on_broken not in ON_BROKEN:
        raise ValueError(f"on_broken: expected one of {', '.join(ON_BROKEN)}, got {on_broken!r}")
    check_num_classes(num_classes)
    left_out: dict[Path, str] = {}

    def complain(path: Path, why: str) -> None:
        if on_broken == "raise":
            raise ValueError(why)
        left_out[path] = why
        logger.warning("left out: %s", why)

    pairs, orphans = _partners(images, masks)
    for path in orphans:
        complain(path, f"{printable(path)}: a mask without its image in {images}")
    kept = []
    for pair in progress(pairs):
        try:
            if not pair.mask.is_file():
                raise ValueError(f"{printable(pair.image)}: no mask {printable(pair.mask)}")
            read_pair(pair, num_classes, reduce_zero_label)
        except (ValueError, OSError) as error:
            complain(pair.mask if str(error).startswith(printable(pair.mask)) else pair.image, str(error))
        else:
            kept.append(pair)
    if left_out:
        logger.warning("%d files do not fit; %d of %d images are used", len(left_out), len(kept), len(pairs))
    if not kept:
        raise ValueError(f"{images}: none of {len(pairs)} images has a mask that fits")
    return FolderPairs(tuple(kept), left_out)


def _partners(images: Path, masks: Path) -> tuple[list[Pair], list[Path]]:
    """Every image with the path of its mask, and the masks without an image."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {printable(folder)}")
    owners: dict[Path, Path] = {}
    for image in find_images([images]):
        mask = masks / image.relative_to(images).with_suffix(".png")
        if mask in owners:
            raise ValueError(
                f"{printable(mask)}: expected one image for it, got {printable(owners[mask])} and {printable(image)}"
            )
        owners[mask] = image
    present = map(Path, walk_files(masks))
    orphans = sorted(p for p in present if p.suffix.lower() in SUFFIXES and p not in owners)
    return [Pair(image, mask) for mask, image in owners.items()], orphans


def batches(count: int, batch: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Indices of endless batches: each epoch another shuffle of them all; batch n is known from (seed, n) alone.

    Args:
        count: of pairs.
        batch: indices in each; an epoch's last ones go into one batch with the next epoch's first.
        seed: of the shuffles.
        start: the batch to begin with, where an interrupted run left off.
    """
    position = start * batch
    epoch, order = -1, np.empty(0, dtype=np.int64)
    while True:
        chosen = []
        for _ in range(batch):
            if position // count != epoch:
                epoch = position // count
                order = np.random.default_rng([seed, epoch]).permutation(count)
            chosen.append(int(order[position % count]))
            position += 1
        yield chosen
