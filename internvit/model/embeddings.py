"""From pixels to tokens: patch embedding, class token and position embedding."""

from typing import Any

import torch
from torch import Tensor, nn

from internvit.config import InternViTConfig
from internvit.geometry import check_pixels, refuse_symbolic, resize_position_embedding
from internvit.model.hooks import is_plain
from internvit.model.packed import PackedTokens, pack_images
from internvit.ops.core.autocast import autocast_dtype
from internvit.ops.core.direct import traced
from internvit.ops.linear import emulated


class Embeddings(nn.Module):
    """The class token and one token per patch, plus the position embedding of the pixels' grid."""

    def __init__(self, config: InternViTConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width, **factory))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=size, stride=size, **factory)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_tokens, width, **factory))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tokens [B, 1 + patches, C] of pixels [B, channels, height, width], cast to the weights' dtype."""
        if self.position_embedding.dim() != 3:
            expected, shape = [1, self.config.num_tokens, self.config.hidden_size], list(self.position_embedding.shape)
            raise ValueError(
                f"position_embedding: expected shape {expected}, got {shape}; parameters that DeepSpeed's ZeRO-3 has "
                "partitioned are whole inside its engine and deepspeed.zero.GatheredParameters"
            )
        grid = check_pixels(self.config, pixel_values)
        pixels = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = convolve(self.patch_embedding, pixels).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], -1, -1).to(patches.dtype)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding_for(grid)

    def position_embedding_for(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding [1, 1 + rows * columns, C] of this grid.

        It is resized at each call: no cache can notice a write through `.data`, which EMA and weight synchronisation
        use. The 300M at 336 x 504, bfloat16, two Zen 4 cores: 11 ms of a forward's 2 s.
        """
        return resize_position_embedding(
            self.position_embedding, self.config.grid_size, grid, self.config.pos_embed_mode
        )


def convolve(module: nn.Module, pixels: Tensor) -> Tensor:
    """module(pixels) of the patch embedding; of a plain Conv2d in float32 where a CPU has no products of the dtype.

    PyTorch's float16 convolution takes 1.8 s for the 300M's 448 px on two Cascade Lake cores, float32's 0.03.
    """
    if traced() or not (is_plain(module, nn.Conv2d) and emulated(pixels)):
        return module(pixels)
    weight, bias = module.weight.float(), None if module.bias is None else module.bias.float()
    dtype = autocast_dtype("cpu") or pixels.dtype
    with torch.autocast("cpu", enabled=False):
        return module._conv_forward(pixels.float(), weight, bias).to(dtype)


def embed(embeddings: Embeddings, pixel_values: Any, pixel_embeds: Any) -> Any:
    """Tokens: of pixels, or those that are given; [B, N, C] of a batch, `PackedTokens` of a list of images.

    Raises:
        TypeError: no tensor, or pixels that are not floating-point.
        ValueError: both or neither input, or tokens of a wrong shape.
    """
    refuse_symbolic(pixel_values)
    if (pixel_values is None) == (pixel_embeds is None):
        raise ValueError(f"give pixel_values or pixel_embeds, got {'neither' if pixel_embeds is None else 'both'}")
    if pixel_embeds is None:
        packed = isinstance(pixel_values, (list, tuple))
        return pack_images(embeddings, pixel_values) if packed else embeddings(pixel_values)
    width = embeddings.config.hidden_size
    if isinstance(pixel_embeds, PackedTokens):
        if pixel_embeds.values.shape[1] != width:
            raise ValueError(f"pixel_embeds: expected [total, {width}], got {list(pixel_embeds.values.shape)}")
        return pixel_embeds
    if not isinstance(pixel_embeds, Tensor):
        raise TypeError(f"pixel_embeds: expected a torch.Tensor [batch, tokens, {width}], got {type(pixel_embeds)}")
    if pixel_embeds.dim() != 3 or pixel_embeds.shape[-1] != width:
        raise ValueError(f"pixel_embeds: expected [batch, tokens, {width}], got {list(pixel_embeds.shape)}")
    return pixel_embeds
