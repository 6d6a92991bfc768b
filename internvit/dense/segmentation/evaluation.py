"""Scores and pictures of a segmentation network on a folder's images, as ADE20K is tested.

resize to fit short_side and long_side -> sliding windows (and the mirror image) -> resize to the mask -> argmax
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from internvit.dense.segmentation.augment import fitted
from internvit.dense.segmentation.folder import Pair, read_pair
from internvit.dense.segmentation.heads import IGNORE, Segmenter
from internvit.dense.segmentation.metrics import Scores, score
from internvit.dense.segmentation.sliding import predict, slide_inference
from internvit.files import atomic_write
from internvit.images import to_pixels


@dataclass(frozen=True)
class Testing:
    """How a network is tested.

    Attributes:
        crop, stride: of the sliding windows.
        short_side, long_side: an image is resized to fit them, whichever is reached first; 0 leaves it as it is.
        flip: also look at the mirror image.
        batch: windows at once.
        reduce_zero_label: see `internvit.dense.segmentation.folder.read_mask`.
    """

    crop: int = 504
    stride: int = 322
    short_side: int = 504
    long_side: int = 2016
    flip: bool = False
    batch: int = 1
    reduce_zero_label: bool = False


@torch.no_grad()
def predict_classes(model: Segmenter, image: np.ndarray, how: Testing, patch_size: int) -> Tensor:
    """The class [H, W] of each pixel of an image [H, W, 3] uint8."""
    photo = Image.fromarray(image)
    width, height = photo.size
    if how.short_side:
        width, height = fitted(photo.size, how.short_side, how.long_side)
    pixels = to_pixels(photo, (height, width))[None].to(next(model.parameters()).device)

    def network(x: Tensor) -> Tensor:
        return slide_inference(model, x, (how.crop,) * 2, (how.stride,) * 2, patch_size, how.batch)

    probabilities = predict(network, pixels, how.flip)
    if probabilities.shape[-2:] != image.shape[:2]:
        probabilities = F.interpolate(probabilities, size=image.shape[:2], mode="bilinear", align_corners=False)
    return probabilities[0].argmax(0).cpu()


def evaluate(model: Segmenter, pairs: Iterable[Pair], num_classes: int, how: Testing, patch_size: int) -> Scores:
    """Scores of a model over pairs of images and masks; it is left in the mode it was in."""
    training = model.training
    model.eval()

    def predictions() -> Iterator[tuple[Tensor, Tensor]]:
        for pair in pairs:
            image, classes = read_pair(pair, num_classes, how.reduce_zero_label)
            yield predict_classes(model, image, how, patch_size), torch.from_numpy(classes.astype(np.int64))

    try:
        return score(predictions(), num_classes)
    finally:
        model.train(training)


def draw_predictions(
    out: Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], names: Sequence[str], dpi: int = 100
) -> None:
    """Draws photographs [H, W, 3] and class maps [H, W] side by side, with the classes' colours below; atomically.

    Args:
        out: a PNG, replaced if it is there.
        rows: of each the same number of pictures, uint8 photographs or integer class maps.
        titles: of the columns.
        names: of the classes; `IGNORE` is drawn black.
        dpi: a picture is 2.2 inches wide.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    palette = mpl.colormaps["tab10" if len(names) <= 10 else "tab20"]
    colours = np.array([palette(k % palette.N)[:3] for k in range(len(names))])
    figure = Figure(figsize=(2.2 * len(titles), 2.2 * len(rows) + 0.7), layout="constrained")
    for axis, picture in zip(
        figure.subplots(len(rows), len(titles), squeeze=False).flat, (p for row in rows for p in row), strict=True
    ):
        known = picture if picture.ndim == 3 else np.where(picture == IGNORE, 0, picture)
        shown = picture if picture.ndim == 3 else np.where((picture == IGNORE)[..., None], 0.0, colours[known])
        axis.imshow(shown)
        axis.set_axis_off()
    for axis, title in zip(figure.axes, titles, strict=False):
        axis.set_title(title, fontsize=9)
    if len(names) <= 20:
        patches = [Patch(color=colour, label=name) for colour, name in zip(colours, names, strict=True)]
        figure.legend(handles=patches, loc="outside lower center", ncols=min(len(names), 6), fontsize=9, frameon=False)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
