"""Pictures of features: the first principal components of the patches as colours."""

import torch
from torch import Tensor


def pca_map(hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
    """The three leading principal components of one image's patches as an RGB picture.

    Args:
        hidden_states: [N, C] or [1, N, C] with N = 1 + rows * columns; the class token is dropped.
        grid: (rows, columns) of patches.

    Returns:
        [rows, columns, 3] float32 in [0, 1]; each component is scaled between its 1st and 99th percentile, its sign
        chosen so that the patches at the border are dark in the first one.

    Raises:
        ValueError: the number of tokens does not fit the grid.
    """
    rows, columns = grid
    tokens = hidden_states.reshape(-1, hidden_states.shape[-1]).float()
    if tokens.shape[0] != 1 + rows * columns:
        raise ValueError(f"pca_map: expected 1 + {rows} * {columns} tokens, got {tokens.shape[0]}")
    patches = tokens[1:] - tokens[1:].mean(0)
    _, _, directions = torch.linalg.svd(patches, full_matrices=False)
    components = (patches @ directions[:3].T).view(rows, columns, 3)
    border = torch.cat([components[0], components[-1], components[:, 0], components[:, -1]]).mean(0)
    components = torch.where(border > 0, -components, components)
    low, high = (torch.quantile(components.flatten(0, 1), q, dim=0) for q in (0.01, 0.99))
    return ((components - low) / (high - low)).clamp(0, 1)
