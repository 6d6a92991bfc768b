"""Semantic segmentation on `InternViTBackbone`: heads, inference in sliding windows, mIoU, folders of images and masks.

examples/segmentation/train.py puts them together.
"""

from internvit.dense.segmentation.folder import IGNORE, Pair, find_pairs
from internvit.dense.segmentation.heads import LinearHead, Segmenter, UPerNetHead, segmentation_loss
from internvit.dense.segmentation.metrics import Scores, score
from internvit.dense.segmentation.sliding import predict, slide_inference

__all__ = [
    "IGNORE",
    "LinearHead",
    "Pair",
    "Scores",
    "Segmenter",
    "UPerNetHead",
    "find_pairs",
    "predict",
    "score",
    "segmentation_loss",
    "slide_inference",
]
