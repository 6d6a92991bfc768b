"""Inference in overlapping windows, and with a mirrored copy, as mmseg does it.

    windows start at 0, stride, 2 stride, …; the last ones end at the image's edges
    logits[y, x]  = mean over the windows that hold (y, x)
    probabilities = mean of softmax(logits) over the image and its mirror image

Source: mmseg, EncoderDecoder.slide_inference and aug_test; OpenGVLab tests with windows of 504 and stride 322.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along one side."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def slide_inference(
    network: Callable[[Tensor], Tensor],
    pixels: Tensor,
    crop_size: tuple[int, int] = (504, 504),
    stride: tuple[int, int] = (322, 322),
    multiple: int = 14,
    batch: int = 1,
) -> Tensor:
    """Logits of images of any size, averaged over overlapping windows.

    Args:
        network: windows [b, channels, h, w] -> logits [b, K, h, w].
        pixels: [B, channels, H, W]. A side shorter than the window is one window; where it is no `multiple`, zeros
            (the mean colour) are put after it and their logits cut off.
        crop_size: (height, width) of a window, multiples of `multiple`.
        stride: (rows, columns) between windows, at most crop_size.
        multiple: the network's patch size.
        batch: windows at once.

    Returns:
        [B, K, H, W], in the logits' dtype.

    Raises:
        ValueError: a crop_size off the patch grid, a stride that leaves gaps or is no positive number.
    """
    if any(side <= 0 or side % multiple for side in crop_size):
        raise ValueError(f"crop_size: expected multiples of {multiple}, got {crop_size[0]}x{crop_size[1]}")
    if not all(0 < step <= side for step, side in zip(stride, crop_size, strict=True)):
        raise ValueError(f"stride: expected 1 to crop_size={tuple(crop_size)}, got {tuple(stride)}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    height, width = pixels.shape[-2:]
    rows, columns = min(crop_size[0], height), min(crop_size[1], width)
    tops, lefts = _starts(height, rows, stride[0]), _starts(width, columns, stride[1])
    places = [(image, y, x) for y in tops for x in lefts for image in range(pixels.shape[0])]
    total: Tensor | None = None
    count = pixels.new_zeros(height, width, dtype=torch.float32)
    for y in tops:
        for x in lefts:
            count[y : y + rows, x : x + columns] += 1
    for start in range(0, len(places), batch):
        chunk = places[start : start + batch]
        windows = torch.stack([pixels[image, :, y : y + rows, x : x + columns] for image, y, x in chunk])
        windows = F.pad(windows, (0, -columns % multiple, 0, -rows % multiple))
        logits = network(windows)[:, :, :rows, :columns]
        if total is None:
            total = logits.new_zeros(pixels.shape[0], logits.shape[1], height, width)
        for (image, y, x), window in zip(chunk, logits, strict=True):
            total[image, :, y : y + rows, x : x + columns] += window
    assert total is not None
    return total / count.to(total.dtype)


def predict(network: Callable[[Tensor], Tensor], pixels: Tensor, flip: bool = False) -> Tensor:
    """Class probabilities [B, K, H, W] in float32.

    Args:
        network: pixels -> logits [B, K, H, W]: a `Segmenter`, or `slide_inference` around one.
        pixels: [B, channels, H, W].
        flip: also look at the mirror image, and take the mean.
    """
    probabilities = network(pixels).float().softmax(1)
    if not flip:
        return probabilities
    return (probabilities + network(pixels.flip(-1)).float().softmax(1).flip(-1)) / 2
