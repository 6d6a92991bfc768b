"""Heads that turn a backbone's maps into logits: OpenGVLab's linear probe, and UPerNet by transformers.

    linear   Conv 1x1 (dropout (BatchNorm (last map)))
    UPerNet  pyramid pooling of the last map, lateral convolutions, top-down sums, all levels joined; and an auxiliary
             FCN on one map in training

Heads compute in their parameters' dtype, float32, whatever the maps come in, as upstream's do beside a bfloat16 tower.
Source: OpenGVLab/InternVL, segmentation/mmseg_custom/models/decode_heads/fcn_head.py and its ADE20K configurations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = 255  # the label of pixels without a class


def check_num_classes(num_classes: int, least: int = 1) -> None:
    """Raises ValueError unless masks of 8 bits can hold this many classes beside `IGNORE`, and they are not too few."""
    if not least <= num_classes <= IGNORE:
        hint = "; the background is a class too" if num_classes == 1 else ""
        raise ValueError(f"num_classes: expected {least} to {IGNORE}, as masks have 8 bits, got {num_classes}{hint}")


class LinearHead(nn.Module):
    """The linear probe: BatchNorm and a 1x1 convolution on the last map.

    Args:
        channels: of that map.
        num_classes: K.
        dropout: of whole channels, before the convolution.
        norm: False leaves the BatchNorm out.
    """

    auxiliary: None = None
    auxiliary_weight = 0.0

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0, norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        nn.init.normal_(self.classifier.weight, std=0.01)  # mmseg's
        assert self.classifier.bias is not None
        nn.init.zeros_(self.classifier.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, h, w] at the last map's size."""
        x = maps[-1].to(self.classifier.weight.dtype)
        return self.classifier(self.dropout(self.norm(x)))


class UPerNetHead(nn.Module):
    """transformers' UPerNet on a backbone's maps, with its auxiliary FCN.

    Args:
        channels: of each map.
        num_classes: K.
        hidden_size: channels inside; upstream takes 1536 for the 6B.
        pool_scales: of the pyramid pooling.
        auxiliary_index: which map the auxiliary head takes, negative ones from the end.
        auxiliary_channels: inside it; by default `hidden_size`.
        auxiliary_weight: of its loss; 0 leaves it out.
        dropout: of whole channels, before the classifier; upstream 0.1.

    Raises:
        ValueError: no map, or none of `auxiliary_index`.
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        hidden_size: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        auxiliary_index: int = 2,
        auxiliary_channels: int | None = None,
        auxiliary_weight: float = 0.4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not channels:
            raise ValueError("channels: expected a number for each map, got none")
        maps = len(channels)
        if auxiliary_weight and not -maps <= auxiliary_index < maps:
            raise ValueError(
                f"auxiliary_index: expected {-maps} to {maps - 1}, as channels has {maps}, or auxiliary_weight=0, "
                f"got {auxiliary_index}"
            )
        try:
            from transformers import UperNetConfig
            from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead
        except ImportError as error:
            raise ImportError("UPerNetHead needs transformers: pip install 'internvit[hf]'") from error
        settings: dict[str, Any] = dict(
            hidden_size=hidden_size,
            pool_scales=list(pool_scales),
            auxiliary_channels=auxiliary_channels or hidden_size,
            auxiliary_in_channels=channels[auxiliary_index] if auxiliary_weight else None,
            num_labels=num_classes,
        )
        config = UperNetConfig(**settings)
        self.decode = UperNetHead(config, in_channels=list(channels))
        self.decode.add_module("classifier", nn.Sequential(nn.Dropout2d(dropout), self.decode.classifier))
        self.auxiliary = UperNetFCNHead(config, list(channels), auxiliary_index) if auxiliary_weight else None
        self.auxiliary_weight = auxiliary_weight

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits [B, K, h, w] at the first map's size."""
        return self.decode(_cast(maps, self))


def _cast(maps: Sequence[Tensor], head: nn.Module) -> list[Tensor]:
    dtype = next(head.parameters()).dtype
    return [x.to(dtype) for x in maps]


def _resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def segmentation_loss(head: LinearHead | UPerNetHead, maps: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of the logits, resized to the labels; plus the auxiliary head's, by its weight, if there is one.

    Args:
        head: gives logits of maps; its `auxiliary` is None or another such module.
        maps: of the backbone.
        labels: [B, H, W] int64 classes; `IGNORE` (255) counts for nothing. A batch of nothing else has loss 0.
    """

    def loss(logits: Tensor) -> Tensor:
        total = F.cross_entropy(_resized(logits, labels.shape[-2:]), labels, ignore_index=IGNORE, reduction="sum")
        return total / (labels != IGNORE).sum().clamp(min=1)

    total = loss(head(maps))
    if head.auxiliary is not None:
        total = total + head.auxiliary_weight * loss(head.auxiliary(_cast(maps, head)))
    return total


class Segmenter(nn.Module):
    """A backbone and a head: pixels in, logits of the same size out.

    Args:
        backbone: `InternViTBackbone`, or anything that gives maps.
        head: `LinearHead` or `UPerNetHead`.
    """

    def __init__(self, backbone: nn.Module, head: LinearHead | UPerNetHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Logits [B, K, H, W] of pixels [B, channels, H, W], in the head's dtype."""
        return _resized(self.head(self.backbone(pixel_values)), pixel_values.shape[-2:])

    def loss(self, pixel_values: Tensor, labels: Tensor) -> Tensor:
        """`segmentation_loss` of labels [B, H, W]."""
        maps = self.backbone(pixel_values)
        with torch.autocast(pixel_values.device.type, enabled=False):
            return segmentation_loss(self.head, maps, labels)
