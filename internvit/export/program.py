"""What an exported file computes, as a program of PyTorch's own ops."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from internvit.export.decompositions import decompositions
from internvit.geometry import check_pixels, feature_map
from internvit.model.vit import InternViT
from internvit.multimodal.connector import InternVLConnector, state_index


class ExportedModel(nn.Module):
    """Pixels in, named tensors out: a tower's features, feature maps of chosen blocks, or image tokens.

    Args:
        model: an `InternViT` in eval mode.
        layers: blocks whose outputs are wanted as maps [B, C, rows, columns], 0 the first, negative ones from the end.
        connector: InternVL's; the output is then what the language model gets, from the hidden state `select_layer`.

    Outputs, in order of `output_names`:
        last_hidden_state [B, 1 + N, C] and pooler_output [B, C]; or feature_map_I [B, C, rows, columns] for each layer
        I; or image_tokens [B, N * downsample_ratio^2, llm_hidden_size].

    Raises:
        ValueError: no InternViT, training mode, layers and a connector together, or no such layer or select_layer.
    """

    def __init__(
        self, model: InternViT, layers: Sequence[int] | None = None, connector: InternVLConnector | None = None
    ) -> None:
        super().__init__()
        if not isinstance(model, InternViT):
            raise ValueError(f"export: model must be an InternViT, got {type(model).__name__}")
        if model.training:
            raise ValueError("export: model must be in eval mode, got training mode; call model.eval()")
        if layers is not None and connector is not None:
            raise ValueError("export: layers and a connector are two outputs; give one of them")
        depth = model.config.num_hidden_layers
        wrong = [layer for layer in layers or () if not -depth <= layer < depth]
        if wrong or (layers is not None and not layers):
            raise ValueError(f"export: layers must be numbers from {-depth} to {depth - 1}, got {list(layers or ())}")
        self.model, self.connector = model, connector
        self.layers = None if layers is None else tuple(layer % depth for layer in layers)
        self.selected = depth if connector is None else state_index(connector.select_layer, depth)

    @property
    def output_names(self) -> tuple[str, ...]:
        if self.layers is not None:
            return tuple(f"feature_map_{layer}" for layer in self.layers)
        return ("image_tokens",) if self.connector is not None else ("last_hidden_state", "pooler_output")

    @property
    def multiple(self) -> int:
        """What height and width are multiples of, in pixels."""
        shuffle = 1 if self.connector is None else round(1 / self.connector.downsample_ratio)
        return self.model.config.patch_size * shuffle

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        grid = check_pixels(self.model.config, pixel_values)
        pixel_values = _on_grid(pixel_values, grid)
        if self.layers is not None:
            hidden_states = self.model(pixel_values, output_hidden_states=True, return_dict=False)[2]
            return tuple(feature_map(hidden_states[layer + 1], grid) for layer in self.layers)
        if self.connector is None:
            return self.model(pixel_values, return_dict=False)[:2]
        if self.selected == self.model.config.num_hidden_layers:
            return (self.connector(self.model(pixel_values, return_dict=False)[0], grid),)
        hidden_states = self.model(pixel_values, output_hidden_states=True, return_dict=False)[2]
        return (self.connector(hidden_states[self.selected], grid),)


def _on_grid(pixel_values: Tensor, grid: tuple[int, int]) -> Tensor:
    """The same pixels, by a view as patches that fails where a runtime is given a size off the patch grid.

    No file holds Python's checks, and a convolution leaves out what is left over at the right and below.
    """
    (rows, columns), (batch, channels, height, width) = grid, pixel_values.shape
    patches = pixel_values.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return patches.reshape(batch, channels, height, width)


def check_shape(model: ExportedModel, size: tuple[int, int] | None, batch: int | None) -> None:
    """Raises the ValueErrors of `export_program`."""
    if size is None and model.model.config.pos_embed_mode == "static":
        raise ValueError("export: pos_embed_mode='static' never resizes; give a size instead of a dynamic one")
    if size is not None and any(side <= 0 or side % model.multiple for side in size):
        raise ValueError(f"export: size must be multiples of {model.multiple}, got {size[0]}x{size[1]}")
    if batch is not None and batch < 1:
        raise ValueError(f"export: batch must be at least 1, got {batch}")


def export_program(
    model: ExportedModel,
    size: tuple[int, int] | None = None,
    batch: int | None = None,
    backend: str | None = None,
) -> torch.export.ExportedProgram:
    """The model as a program of PyTorch's own ops; the position embedding is resized inside.

    Args:
        size: (height, width) in pixels; None for any from two multiples up.
        batch: the number of images; None for any.
        backend: whose kernels it keeps; see `decompositions`.

    Raises:
        ValueError: a size off the patch grid, a batch below 1, or any size for a model that never resizes.
    """
    check_shape(model, size, batch)
    config, multiple = model.model.config, model.multiple
    dynamic: dict[int, Any] = {} if batch is not None else {0: torch.export.Dim("batch", min=1)}
    if size is None:
        dynamic |= {2: multiple * torch.export.Dim("rows", min=2), 3: multiple * torch.export.Dim("columns", min=2)}
    # Another number of patches in each direction than the native grid, and not one: a size seen is not a size assumed.
    height, width = size or (multiple * 3, multiple * 4)
    pixels = torch.zeros(
        batch or 2, config.num_channels, height, width, dtype=model.model.dtype, device=model.model.device
    )
    with torch.no_grad():
        program = torch.export.export(model, (pixels,), dynamic_shapes={"pixel_values": dynamic or None})
        return program.run_decompositions(decompositions(backend))
