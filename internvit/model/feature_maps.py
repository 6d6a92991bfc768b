"""Outputs of chosen blocks as timm's models give them: `forward_intermediates` with its arguments and results.

Source: timm 1.0, VisionTransformer.forward_intermediates and feature_take_indices.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from internvit.geometry import feature_map
from internvit.model.packed import pack_images

OUTPUT_FORMATS = ("NCHW", "NLC")


def take_indices(layers: int, indices: int | Sequence[int] | None) -> tuple[int, ...]:
    """Numbers of blocks from 0: all for None, the last n for an int, negative ones counted from the end.

    Raises:
        ValueError: no block, or one that is not there.
    """
    if indices is None:
        return tuple(range(layers))
    if isinstance(indices, int):
        if not 0 < indices <= layers:
            raise ValueError(f"indices: expected the last 1 to {layers} blocks, got {indices}")
        return tuple(range(layers - indices, layers))
    blocks = tuple(i + layers if i < 0 else i for i in indices)
    if not blocks or any(not 0 <= i < layers for i in blocks):
        raise ValueError(f"indices: expected numbers of blocks from {-layers} to {layers - 1}, got {tuple(indices)}")
    return blocks


def forward_intermediates(
    model: Any,
    x: Tensor | Sequence[Tensor],
    indices: int | Sequence[int] | None = None,
    return_prefix_tokens: bool = False,
    norm: bool = False,
    stop_early: bool = False,
    output_fmt: str = "NCHW",
    intermediates_only: bool = False,
    output_dict: bool = False,
) -> Any:
    """The last hidden state and the outputs of chosen blocks, in the order of the blocks, as timm returns them.

    Args:
        model: an `InternViT`, or another module with its `config`, `embeddings` and `encoder`.
        x: pixels [B, channels, height, width]; or a list of images, whose maps, tokens and class tokens are lists of
            [C, rows, columns], [rows * columns, C] and [1, C], and whose last hidden state is `PackedTokens`.
        indices: numbers of blocks, 0 the first; the last n for an int, all for None.
        return_prefix_tokens: also the class token of each, [B, 1, C].
        norm: timm applies its final norm to each; InternViT has none, so both are the same.
        stop_early: run no block past the last one asked for; the last hidden state is then that block's.
        output_fmt: "NCHW" for maps [B, C, rows, columns], "NLC" for tokens [B, rows * columns, C].
        intermediates_only: without the last hidden state.
        output_dict: under the names "image_features", "image_intermediates" and "image_intermediates_prefix".

    Returns:
        (last hidden state [B, N, C], list); the list alone; or a dict. The list holds (map, class token) pairs with
        `return_prefix_tokens`, except in a dict.

    Raises:
        ValueError: another output_fmt, or no such block.
    """
    if output_fmt not in OUTPUT_FORMATS:
        raise ValueError(f"output_fmt: expected one of {', '.join(OUTPUT_FORMATS)}, got {output_fmt!r}")
    taken = take_indices(len(model.encoder.layers), indices)
    depth = max(taken) + 1 if stop_early else None
    last: Any
    prefix: list[Any]
    maps: list[Any]
    if isinstance(x, Tensor):
        last, hidden_states, _ = model.encoder(model.embeddings(x), indices=taken, depth=depth)
        prefix = [state[:, :1] for state in hidden_states]
        patch = model.config.patch_size
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        maps = [feature_map(state, grid) if output_fmt == "NCHW" else state[:, 1:] for state in hidden_states]
    else:
        packed = pack_images(model.embeddings, x)
        results = model.encoder(packed.values, indices=taken, depth=depth, sequences=packed.sequences)
        last, *states = map(packed.with_values, (results[0], *results[1]))
        prefix = [[image[:1] for image in state] for state in states]
        maps = [state.maps() if output_fmt == "NCHW" else [image[1:] for image in state] for state in states]
    if output_dict:
        features: dict[str, Any] = {"image_intermediates": maps}
        if return_prefix_tokens:
            features["image_intermediates_prefix"] = prefix
        return features if intermediates_only else {**features, "image_features": last}
    listed: list[Any] = list(zip(maps, prefix, strict=True)) if return_prefix_tokens else maps
    return listed if intermediates_only else (last, listed)
