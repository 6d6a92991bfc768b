"""Mean intersection over union, by torchmetrics.

    IoU of a class = pixels that are and are called it / pixels that are or are called it,  over all images together

A class that neither the masks nor the predictions hold counts for nothing.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from internvit.dense.segmentation.heads import IGNORE, check_num_classes


class Scores(NamedTuple):
    """What `score` gives.

    Attributes:
        miou: mean over the classes that occur, in [0, 1].
        iou: of each class; NaN where it does not occur.
        accuracy: share of the pixels that are right.
    """

    miou: float
    iou: tuple[float, ...]
    accuracy: float


def score(predictions: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Scores:
    """Scores of pairs (predicted classes, true classes), integers of one shape; `IGNORE` among the true is left out.

    Raises:
        ValueError: no pair, or nothing but IGNORE; two shapes; a class that does not exist, where the true one is not
            IGNORE; fewer than 2 classes, or more than masks of 8 bits hold.
        TypeError: classes that are no integers.
        ImportError: torchmetrics is not installed.
    """
    check_num_classes(num_classes, least=2)
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
    except ImportError as error:
        raise ImportError("mIoU needs torchmetrics: pip install 'internvit[segmentation]'") from error
    jaccard = MulticlassJaccardIndex(
        num_classes, average="none", ignore_index=IGNORE, zero_division=float("nan"), validate_args=False
    )
    accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE, validate_args=False)
    pixels = 0
    for number, pair in enumerate(predictions):
        predicted, labels = _known(*pair, num_classes, number)
        pixels += len(labels)
        if len(labels):  # torchmetrics takes no empty ones
            jaccard.update(predicted, labels)
            accuracy.update(predicted, labels)
    if not pixels:
        raise ValueError(f"predictions: expected pixels with a class, got none but {IGNORE}")
    iou = jaccard.compute()
    return Scores(iou.nanmean().item(), tuple(iou.tolist()), accuracy.compute().item())


def _known(predicted: Tensor, labels: Tensor, num_classes: int, number: int) -> tuple[Tensor, Tensor]:
    """Both classes [N] of the pixels that have one; torchmetrics would take a class that is none for another.

    Raises:
        ValueError, TypeError: of `score`.
    """
    where = f"predictions: pair {number}"
    if predicted.shape != labels.shape:
        shapes = f"{list(predicted.shape)} and {list(labels.shape)}"
        raise ValueError(f"{where}: expected predicted and true classes of one shape, got {shapes}")
    for kind, classes in (("predicted", predicted), ("true", labels)):
        if classes.is_floating_point() or classes.is_complex():
            raise TypeError(f"{where}: expected {kind} classes that are integers, got {classes.dtype}")
    labels = labels.cpu().long()
    known = labels != IGNORE
    predicted, labels = predicted.cpu().long()[known], labels[known]
    for kind, classes in (("predicted", predicted), ("true", labels)):
        wrong = classes[(classes < 0) | (classes >= num_classes)]
        if len(wrong):
            others = f" or {IGNORE}" if kind == "true" else ""
            raise ValueError(f"{where}: expected {kind} classes from 0 to {num_classes - 1}{others}, got {wrong[0]}")
    return predicted, labels
