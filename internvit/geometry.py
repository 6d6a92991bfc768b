"""Pixels and patches: the grid that an image has, and the position embedding of a grid."""

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.config import InternViTConfig


def check_pixels(config: InternViTConfig, pixel_values: Tensor) -> tuple[int, int]:
    """The grid (rows, columns) of patches of [B, channels, height, width], or a ValueError."""
    size, channels = config.patch_size, config.num_channels
    if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
        raise ValueError(f"pixel_values: expected [batch, {channels}, height, width], got {list(pixel_values.shape)}")
    height, width = pixel_values.shape[2:]
    if height == 0 or width == 0 or height % size or width % size:
        raise ValueError(
            f"pixel_values: height and width must be multiples of patch_size={size}, got {height}x{width}; "
            f"resize to {max(round(height / size), 1) * size}x{max(round(width / size), 1) * size}, for example"
        )
    return height // size, width // size


def resize_position_embedding(
    position_embedding: Tensor, native: tuple[int, int], grid: tuple[int, int], mode: str
) -> Tensor:
    """The position embedding [1, 1 + N, C] for another grid of patches, by one of `config.POS_EMBED_MODES`.

    At the native grid it is returned as it is: bicubic resampling to the same size is the identity to the bit.
    """
    if grid == native:
        return position_embedding
    if mode == "static":
        raise ValueError(
            f"position embedding: its grid is {native[0]}x{native[1]} and pos_embed_mode='static' never resizes, "
            f"got {grid[0]}x{grid[1]}; call resize_pos_embeddings or choose another pos_embed_mode"
        )
    position = position_embedding[:, 1:]
    if mode != "param_dtype" and position.dtype != torch.float64:
        position = position.float()
    position = position.unflatten(1, native).permute(0, 3, 1, 2)  # [1, C, rows, columns]
    position = F.interpolate(position, size=grid, mode="bicubic", align_corners=False, antialias=mode == "antialias")
    position = position.flatten(2).transpose(1, 2).to(position_embedding.dtype)  # [1, N, C]
    return torch.cat([position_embedding[:, :1], position], dim=1)


def feature_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B, 1 + rows * columns, C] as a contiguous map [B, C, rows, columns]; the class token is dropped."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous()
