"""A simple feature pyramid for detection: the last map alone becomes maps of stride 4, 8, 16 and 32.

    4:  ConvTranspose 2x2/2 C -> C/2 -> LayerNorm -> GELU -> ConvTranspose 2x2/2 C/2 -> C/4
    8:  ConvTranspose 2x2/2 C -> C/2
    16: the map itself
    32: MaxPool 2x2/2
    then each: Conv 1x1 to out_channels -> LayerNorm -> Conv 3x3 -> LayerNorm        (LayerNorms over channels)

Source: ViTDet (Li et al. 2022), detectron2's SimpleFeaturePyramid; mmdet's InternViT has the same four levels.
"""

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from internvit.dense.backbone import InternViTBackbone
from internvit.dense.pyramid import EPS, ChannelsFirstLayerNorm, HalvingMaxPool


class SimpleFeaturePyramid(nn.Module):
    """One map [B, C, h, w] in; maps of 4, 2, 1 and 1/2 times its size with `out_channels` channels out.

    Args:
        channels: of the map; a multiple of 4.
        out_channels: of each level.

    Raises:
        ValueError: channels that cannot be halved twice.
    """

    def __init__(self, channels: int, out_channels: int = 256) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"channels: expected a multiple of 4, got {channels}")

        def up(c: int) -> nn.Module:
            return nn.ConvTranspose2d(c, c // 2, kernel_size=2, stride=2)

        def level(resize: nn.Sequential, c: int) -> nn.Sequential:
            return nn.Sequential(
                *resize,
                nn.Conv2d(c, out_channels, kernel_size=1, bias=False),
                ChannelsFirstLayerNorm(out_channels, eps=EPS),
                nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
                ChannelsFirstLayerNorm(out_channels, eps=EPS),
            )

        half, quarter = channels // 2, channels // 4
        norm = ChannelsFirstLayerNorm(half, eps=EPS)
        resizers = (
            (nn.Sequential(up(channels), norm, nn.GELU(), up(half)), quarter),
            (nn.Sequential(up(channels)), half),
        )
        self.levels = nn.ModuleList(level(resize, c) for resize, c in resizers)
        self.levels.append(level(nn.Sequential(), channels))
        self.levels.append(level(nn.Sequential(HalvingMaxPool()), channels))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, C, h, w] -> [B, out, 4h, 4w], [B, out, 2h, 2w], [B, out, h, w], [B, out, h // 2, w // 2].

        A side of one cell stays one in the last level.
        """
        return tuple(level(x) for level in self.levels)


class DetectionBackbone(nn.Module):
    """An `InternViTBackbone` and a simple feature pyramid, as torchvision's detectors take it.

    Torchvision reads a level's stride off its size, as a whole number of pixels and a power of two: the patch size must
    be one, so load the tower with `patch_size=16`, as OpenGVLab's detectors do.

    Args:
        backbone: its last map is used; without `fpn`.
        out_channels: of each level; torchvision reads it here.
        pool: end in a fifth level "pool" of stride 64, every second cell of the last, as torchvision's FPN does. The
            detectors' default anchors expect five levels.

    Raises:
        ValueError: a patch size that is no power of two from 4 on, or a backbone with a pyramid of its own.

    Example:
        >>> tower = internvit.InternViTBackbone.from_pretrained(path, out_indices=(-1,), patch_size=16, image_size=1024)
        >>> model = torchvision.models.detection.MaskRCNN(DetectionBackbone(tower), num_classes=91).eval()
        >>> boxes = model([photo])[0]["boxes"]  # of a photo [3, H, W] in [0, 1]
    """

    def __init__(self, backbone: InternViTBackbone, out_channels: int = 256, pool: bool = True) -> None:
        super().__init__()
        patch = backbone.config.patch_size
        if patch < 4 or patch & (patch - 1):
            raise ValueError(
                f"backbone: detectors need a patch_size that is a power of two, got {patch}; "
                f"load it with from_pretrained(..., patch_size=16)"
            )
        if backbone.fpn:
            raise ValueError("backbone: expected fpn=False, this class makes its own pyramid of the last map")
        self.backbone = backbone
        self.pyramid = SimpleFeaturePyramid(backbone.config.hidden_size, out_channels)
        self.out_channels = out_channels
        self.pool = pool

    def forward(self, pixel_values: Tensor) -> "OrderedDict[str, Tensor]":
        """Maps "0" to "3", and "pool" if there is one, of pixels [B, channels, height, width]."""
        maps = self.pyramid(self.backbone(pixel_values)[-1])
        named = OrderedDict((str(i), x) for i, x in enumerate(maps))
        if self.pool:
            named["pool"] = F.max_pool2d(maps[-1], kernel_size=1, stride=2)
        return named
