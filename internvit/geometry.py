"""Pixels and patches: the grid that an image has, and the position embedding of a grid."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.config import InternViTConfig


def check_pixels(config: InternViTConfig, pixel_values: Tensor) -> tuple[int, int]:
    """The grid (rows, columns) of patches of floating-point pixels [B, channels, height, width].

    Raises:
        TypeError: no tensor, or not floating-point.
        ValueError: a wrong shape or number of channels, or a size off the patch grid.
    """
    size, channels = config.patch_size, config.num_channels
    _check_type(pixel_values, channels)
    if pixel_values.dim() != 4 or pixel_values.shape[1] != channels:
        raise ValueError(f"pixel_values: expected [batch, {channels}, height, width], got {list(pixel_values.shape)}")
    height, width = pixel_values.shape[2:]
    if height == 0 or width == 0 or height % size or width % size:
        raise ValueError(
            f"pixel_values: height and width must be multiples of patch_size={size}, got {height}x{width}; "
            f"resize to {max(round(height / size), 1) * size}x{max(round(width / size), 1) * size}, for example"
        )
    return height // size, width // size


def refuse_symbolic(value: Any) -> None:
    """Raises a TypeError for what torch.fx traces symbolically, naming the ways that work."""
    if f"{type(value).__module__}.{type(value).__qualname__}" == "torch.fx.proxy.Proxy":
        raise TypeError(
            "pixel_values: an InternViT cannot be traced symbolically by torch.fx (symbolic_trace, "
            "create_feature_extractor); for features of chosen blocks call model.forward_intermediates(pixels, "
            "indices) or register forward hooks, for a graph use torch.export.export"
        )


def _check_type(pixel_values: Any, channels: int) -> None:
    if not isinstance(pixel_values, Tensor):
        refuse_symbolic(pixel_values)
        raise TypeError(
            f"pixel_values: expected a torch.Tensor [batch, {channels}, height, width], got a "
            f"{type(pixel_values).__module__}.{type(pixel_values).__qualname__}; make one with torch.as_tensor"
        )
    if not pixel_values.is_floating_point():
        hint = "" if pixel_values.is_complex() else "; divide by 255 and normalise by ImageNet's mean and deviation"
        raise TypeError(f"pixel_values: expected floating-point pixels, got {pixel_values.dtype}{hint}")


def resize_position_embedding(
    position_embedding: Tensor, native: tuple[int, int], grid: tuple[int, int], mode: str
) -> Tensor:
    """The position embedding [1, 1 + N, C] for another grid of patches, by one of `config.POS_EMBED_MODES`.

    At the native grid it is returned as it is: bicubic resampling to the same size is the identity to the bit. So a
    program traced with sizes that are not known resamples always, and takes the native grid too.
    """
    if _is_native(grid, native, mode):
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


def _is_native(grid: tuple[int, int], native: tuple[int, int], mode: str) -> bool:
    if mode == "static" or not torch.compiler.is_compiling():
        return grid == native
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy: 0.5 s

    return all(statically_known_true(side == stored) for side, stored in zip(grid, native, strict=True))


def feature_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B, 1 + rows * columns, C] as a contiguous map [B, C, rows, columns]; the class token is dropped."""
    return tokens[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous()
