"""What is kept of an image: its class token, the mean of its patches, all tokens, a map, or InternVL's image tokens."""

from typing import TYPE_CHECKING

from torch import Tensor

from internvit.geometry import feature_map

if TYPE_CHECKING:
    from internvit.config import InternViTConfig
    from internvit.multimodal.connector import InternVLConnector

POOLINGS = ("class", "mean", "tokens", "map", "connector")
_Shape = tuple[int | None, ...]


def pool(pooling: str, tokens: Tensor, grid: tuple[int, int], connector: "InternVLConnector | None" = None) -> Tensor:
    """Features [B, ...] of hidden states [B, 1 + rows * columns, C]; `pooled_shape` says their shape."""
    match pooling:
        case "class":
            return tokens[:, 0]
        case "mean":
            return tokens[:, 1:].float().mean(1)
        case "tokens":
            return tokens
        case "map":
            return feature_map(tokens, grid)
    assert connector is not None
    return connector(tokens.to(connector.get_parameter("mlp1.1.weight").dtype), grid)


def pooled_shape(
    pooling: str,
    config: "InternViTConfig",
    grid: tuple[int | None, int | None],
    connector: "InternVLConnector | None" = None,
) -> _Shape:
    """The shape of one image's features; None where it varies from image to image, as the grid does."""
    rows, columns = grid
    tokens = None if rows is None or columns is None else rows * columns
    width = config.hidden_size
    match pooling:
        case "class" | "mean":
            return (width,)
        case "tokens":
            return (None if tokens is None else 1 + tokens, width)
        case "map":
            return (width, rows, columns)
    assert connector is not None
    side = round(1 / connector.downsample_ratio)
    return (None if tokens is None else tokens // side**2, connector.get_parameter("mlp1.3.weight").shape[0])
