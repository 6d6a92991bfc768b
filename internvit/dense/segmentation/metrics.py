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
        ValueError: no pair, nothing but IGNORE, or more classes than masks of 8 bits hold.
        ImportError: torchmetrics is not installed.
    """
    check_num_classes(num_classes)
    try:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
    except ImportError as error:
        raise ImportError("mIoU needs torchmetrics: pip install 'internvit[segmentation]'") from error
    jaccard = MulticlassJaccardIndex(
        num_classes, average="none", ignore_index=IGNORE, zero_division=float("nan"), validate_args=False
    )
    accuracy = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORE, validate_args=False)
    pixels = 0
    for predicted, labels in predictions:
        pixels += int((labels != IGNORE).sum())
        jaccard.update(predicted.cpu(), labels.cpu())
        accuracy.update(predicted.cpu(), labels.cpu())
    if not pixels:
        raise ValueError(f"predictions: expected pixels with a class, got none but {IGNORE}")
    iou = jaccard.compute()
    return Scores(iou.nanmean().item(), tuple(iou.tolist()), accuracy.compute().item())
