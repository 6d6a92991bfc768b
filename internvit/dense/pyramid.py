"""The feature pyramid that OpenGVLab's segmentation backbone ends in.

    up1: ConvTranspose 2x2/2 -> LayerNorm -> GELU -> ConvTranspose 2x2/2     4 times the map
    up2: ConvTranspose 2x2/2                                                 2 times
    up3: nothing
    up4: MaxPool 2x2/2                                                       half, rounded down, at least 1

Each ends in a LayerNorm over channels if asked for. Source: OpenGVLab/InternVL,
segmentation/mmseg_custom/models/backbones/intern_vit_6b.py; names and shapes of parameters are upstream's.
"""

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-6


class ChannelsFirstLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of [B, C, H, W], computed in at least float32."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == self.weight.dtype else x.to(self.weight.dtype)
        y = F.layer_norm(wide.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.movedim(-1, 1).to(x.dtype)


class HalvingMaxPool(nn.Module):
    """MaxPool 2x2/2 that keeps a side of one cell: [B, C, h, w] -> [B, C, max(h // 2, 1), max(w // 2, 1)]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=(min(2, x.shape[-2]), min(2, x.shape[-1])))


class FeaturePyramid(nn.Module):
    """Four maps of one size in, four of 4, 2, 1 and half that size out.

    Args:
        channels: of every map, in and out.
        final_norm: whether each level ends in a LayerNorm over channels.
    """

    def __init__(self, channels: int, final_norm: bool = False) -> None:
        super().__init__()

        def up() -> nn.Module:
            return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)

        def last() -> nn.Module:
            return ChannelsFirstLayerNorm(channels, eps=EPS) if final_norm else nn.Identity()

        self.up1 = nn.Sequential(up(), ChannelsFirstLayerNorm(channels, eps=EPS), nn.GELU(), up(), last())
        self.up2 = nn.Sequential(up(), last())
        self.up3 = nn.Sequential(nn.Identity(), last())
        self.up4 = nn.Sequential(HalvingMaxPool(), last())
        for module in self.modules():
            if isinstance(module, nn.ConvTranspose2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Four [B, C, h, w] -> [B, C, 4h, 4w], [B, C, 2h, 2w], [B, C, h, w], [B, C, h // 2, w // 2].

        A side of one cell stays one in the last level.
        """
        if len(maps) != 4:
            raise ValueError(f"maps: the feature pyramid takes four, got {len(maps)}")
        return tuple(level(x) for level, x in zip((self.up1, self.up2, self.up3, self.up4), maps, strict=True))
