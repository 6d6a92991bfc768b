"""Pictures of features: the first principal components of the patches as colours."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from internvit.files import atomic_write
from internvit.images import open_photo, printable

_MAX_DRAWN = 16


def pca_map(hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
    """The three leading principal components of one image's patches as an RGB picture.

    Args:
        hidden_states: [N, C] or [1, N, C] with N = 1 + rows * columns; the class token is dropped.
        grid: (rows, columns) of patches.

    Returns:
        [rows, columns, 3] float32 in [0, 1]; each component is scaled between its 1st and 99th percentile, its sign
        chosen so that the patches at the border are dark in the first one. A component that does not vary is 0.

    Raises:
        ValueError: the number of tokens does not fit the grid.
    """
    rows, columns = grid
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
    if tokens.shape[0] != 1 + rows * columns:
        raise ValueError(f"pca_map: expected 1 + {rows} * {columns} tokens, got {tokens.shape[0]}")
    patches = tokens[1:] - tokens[1:].mean(0)
    _, _, directions = torch.linalg.svd(patches, full_matrices=False)
    components = patches @ directions[:3].T
    components = torch.nn.functional.pad(components, (0, 3 - components.shape[1])).view(rows, columns, 3)
    border = torch.cat([components[0], components[-1], components[:, 0], components[:, -1]]).mean(0)
    components = torch.where(border > 0, -components, components)
    low, high = (torch.quantile(components.flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
    return torch.where(high > low, (components - low) / (high - low), 0).clamp(0, 1)


def check_picture(out: Path, images: Sequence[Path], overwrite: bool) -> None:
    """Refuses the file of a picture before anything is computed.

    Raises:
        FileExistsError: it exists, and overwrite is False.
        ValueError: it is one of the images, or matplotlib writes no pictures of its suffix.
    """
    from matplotlib.figure import Figure

    if out.exists() and any(path.exists() and path.samefile(out) for path in images):
        raise ValueError(f"{printable(out)}: is one of the images")
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise FileExistsError(f"{printable(out)} exists; give another --pca, or --overwrite")
    formats = Figure().canvas.get_supported_filetypes()
    if out.suffix and out.suffix[1:].lower() not in formats:
        raise ValueError(f"{printable(out)}: expected a suffix among {', '.join(sorted(formats))}, got {out.suffix}")


def make_folder(out: Path) -> None:
    """Makes the folder of a picture, as one is made for features, before they are computed.

    Raises:
        ValueError: there can be no such folder.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{printable(out)}: cannot be written: {error.strerror or error}") from error


def draw_pca(out: Path, features: Path, images: Sequence[Path], size: tuple[int, int], patch_size: int) -> int:
    """Draws each photograph and beside it the principal components of its last block; returns how many rows.

    At most 16 images are drawn; the file is replaced atomically. `features` is a file of `extract`; of its layers the
    last in the network is drawn, whatever their order and whether or not they are counted from the end.
    """
    images = images[:_MAX_DRAWN]
    with safe_open(features, framework="pt") as file:
        metadata = file.metadata()
        depth = json.loads(metadata["config"])["num_hidden_layers"]
        names = metadata["layers"].split(",")
        last = names[0] if names == ["last"] else max(names, key=lambda name: int(name) % depth)
        titles = [] if last == "last" else [f"block {int(last) % depth}"]
        tokens = [[file.get_tensor(f"{path}:{last}")] for path in images]
        draw_pca_columns(out, images, tokens, size, patch_size, titles)
    return len(images)


def draw_pca_columns(
    out: Path,
    images: Sequence[Path],
    tokens: Sequence[Sequence[Tensor]],
    size: tuple[int, int],
    patch_size: int,
    titles: Sequence[str] = (),
) -> None:
    """Draws each photograph and beside it the principal components of its `tokens` [N, C], one column each.

    The file is replaced atomically. `titles` are those of the columns, in the first row.
    """
    from matplotlib.figure import Figure

    grid = size[0] // patch_size, size[1] // patch_size
    columns = 1 + len(tokens[0])
    figure = Figure(figsize=(3.5 * columns, 3.4 * len(images)), layout="constrained")
    for row, (path, states) in enumerate(zip(images, tokens, strict=True)):
        picture = open_photo(path).resize((size[1], size[0]))
        shown = [np.asarray(picture), *(pca_map(t, grid).numpy() for t in states)]
        for column, (image, title) in enumerate(zip(shown, [path.name, *(titles or [""] * len(states))], strict=True)):
            axis = figure.add_subplot(len(images), columns, columns * row + column + 1)
            axis.imshow(image)
            axis.set_axis_off()
            axis.set_title(title if column == 0 or row == 0 else "", fontsize=9, parse_math=False)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=110, format=out.suffix[1:].lower() or "png")
