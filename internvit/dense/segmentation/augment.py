"""From an image and its mask to a training sample, as OpenGVLab trains on ADE20K.

    resize (short side 504, long side at most 2016, times 0.5 to 2) -> crop 504 -> mirror -> brightness, contrast,
    saturation, hue -> ImageNet's mean and standard deviation -> pad with the mean colour and IGNORE

Every choice comes from the generator that is given, so a sample is known from its seed. The jitter is Pillow's, of the
same range as mmseg's PhotoMetricDistortion and not its bits. Source: segmentation/configs/_base_/datasets/
ade20k_504x504.py of OpenGVLab/InternVL.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from internvit.dense.segmentation.heads import IGNORE
from internvit.images import to_pixels


@dataclass(frozen=True)
class Augmentation:
    """How training samples are made.

    Attributes:
        crop: side of the square sample.
        short_side, long_side: an image is resized to fit them, whichever is reached first.
        ratio: then by a factor between these.
        max_class_ratio: a crop of which one class takes more is drawn again, ten times at most; 1 takes any.
        flip: probability of the mirror image.
        jitter: whether to change brightness, contrast, saturation and hue.
    """

    crop: int = 504
    short_side: int = 504
    long_side: int = 2016
    ratio: tuple[float, float] = (0.5, 2.0)
    max_class_ratio: float = 0.75
    flip: float = 0.5
    jitter: bool = True

    def __call__(self, image: np.ndarray, classes: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Pixels [3, crop, crop] float32 and classes [crop, crop] int64 of an image [H, W, 3] and its mask [H, W]."""
        photo, mask = Image.fromarray(image), Image.fromarray(classes)
        size = fitted(photo.size, self.short_side, self.long_side, rng.uniform(*self.ratio))
        if size != photo.size:
            photo = photo.resize(size, Image.Resampling.BILINEAR)
            mask = mask.resize(size, Image.Resampling.NEAREST)
        x, y = self._corner(np.asarray(mask), rng)
        box = (x, y, min(x + self.crop, size[0]), min(y + self.crop, size[1]))
        photo, mask = photo.crop(box), mask.crop(box)
        if rng.random() < self.flip:
            photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            photo = jittered(photo, rng)
        pixels = torch.zeros(3, self.crop, self.crop, dtype=torch.float32)
        labels = torch.full((self.crop, self.crop), IGNORE, dtype=torch.int64)
        width, height = photo.size
        pixels[:, :height, :width] = to_pixels(photo, (height, width))
        labels[:height, :width] = torch.from_numpy(np.asarray(mask).astype(np.int64))
        return pixels, labels

    def _corner(self, classes: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        height, width = classes.shape
        x = y = 0
        for _ in range(10):
            y = int(rng.integers(max(height - self.crop, 0) + 1))
            x = int(rng.integers(max(width - self.crop, 0) + 1))
            part = classes[y : y + self.crop, x : x + self.crop]
            _, counts = np.unique(part[part != IGNORE], return_counts=True)
            if self.max_class_ratio >= 1 or (len(counts) > 1 and counts.max() < self.max_class_ratio * counts.sum()):
                break
        return x, y


def fitted(size: tuple[int, int], short_side: int, long_side: int, factor: float = 1.0) -> tuple[int, int]:
    """(width, height) scaled so that short_side or long_side, times factor, is reached first; at least 1 pixel."""
    scale = factor * min(short_side / min(size), long_side / max(size))
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def jittered(photo: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another brightness, contrast, saturation and hue, each with probability 1/2."""
    for enhancer, low, high in (
        (ImageEnhance.Brightness, 0.75, 1.25),
        (ImageEnhance.Contrast, 0.5, 1.5),
        (ImageEnhance.Color, 0.5, 1.5),
    ):
        if rng.random() < 0.5:
            photo = enhancer(photo).enhance(rng.uniform(low, high))
    if rng.random() < 0.5:
        hsv = np.asarray(photo.convert("HSV")).copy()
        hsv[..., 0] += np.uint8(rng.integers(-13, 14) % 256)  # 18 of 360 degrees; uint8 wraps as hue does
        photo = Image.frombytes("HSV", photo.size, hsv.tobytes()).convert("RGB")
    return photo
