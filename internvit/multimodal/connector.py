"""InternVL's connector between the vision tower and the language model.

    tokens [B, 1 + N, C] -> no class token -> pixel shuffle [B, N / 4, 4C] -> LayerNorm -> Linear -> GELU -> Linear

Pixel shuffle folds each 2x2 square of patches into one token of four times the width. Version "v2" keeps the image's
orientation; "v1", of the first InternVL, swaps rows and columns.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvit.checkpoint.files import CONFIG, read_tensors
from internvit.files import read_json
from internvit.model.fused_block import cast_for_linear, fc1_gelu, linear_per_image
from internvit.model.hooks import is_plain
from internvit.ops import layer_norm

PS_VERSIONS = ("v1", "v2")
_EPS = 1e-5
_NAMES = {  # OpenGVLab's (the parameters' own) and transformers'
    "mlp1.0": "multi_modal_projector.layer_norm",
    "mlp1.1": "multi_modal_projector.linear_1",
    "mlp1.3": "multi_modal_projector.linear_2",
}


def pixel_shuffle(x: Tensor, scale_factor: float = 0.5, version: str = "v2") -> Tensor:
    """Folds squares of neighbouring patches into the channels.

    Args:
        x: [B, rows, columns, C].
        scale_factor: of rows and of columns, 1 / 2 for squares of two by two.
        version: "v2", or "v1", whose result is transposed.

    Returns:
        [B, rows * scale_factor, columns * scale_factor, C / scale_factor^2] ("v1": rows and columns swapped).

    Raises:
        ValueError: a shape that the squares do not cover, or another version.

    Source: pixel_shuffle in OpenGVLab's modeling_internvl_chat.py.
    """
    side = round(1 / scale_factor) if scale_factor else 0
    if side < 1 or not math.isclose(side * scale_factor, 1):
        raise ValueError(f"pixel_shuffle: scale_factor must be one over an integer, got {scale_factor}")
    if version not in PS_VERSIONS:
        raise ValueError(f"pixel_shuffle: version must be one of {', '.join(map(repr, PS_VERSIONS))}, got {version!r}")
    if x.dim() != 4 or x.shape[1] % side or x.shape[2] % side:
        raise ValueError(
            f"pixel_shuffle: x must be [batch, rows, columns, channels] with rows and columns multiples of {side}, "
            f"got {list(x.shape)}"
        )
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, rows / side, side, columns / side, side, C]
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return x.permute(*order).flatten(3)


class InternVLConnector(nn.Module):
    """InternVL's connector: class token dropped, pixel shuffle, LayerNorm and a two-layer MLP.

    Args:
        hidden_size: C, the width of the vision tower.
        llm_hidden_size: the width of the language model.
        downsample_ratio: of the pixel shuffle.
        ps_version: "v2", or "v1" for the first InternVL (the default of upstream's class, used by two of its recipes).
        device, dtype: of the parameters.

    Parameters have OpenGVLab's names (`mlp1.0`, `mlp1.1`, `mlp1.3`); `load_state_dict` takes transformers'
    (`multi_modal_projector.*`) as well.

    Source: extract_feature in OpenGVLab's modeling_internvl_chat.py; InternVLMultiModalProjector in transformers.
    """

    def __init__(
        self,
        hidden_size: int,
        llm_hidden_size: int,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ps_version not in PS_VERSIONS:
            raise ValueError(f"InternVLConnector: ps_version must be one of 'v1', 'v2', got {ps_version!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = hidden_size * round(1 / downsample_ratio) ** 2
        self.hidden_size = hidden_size
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(width, eps=_EPS, **factory),
            nn.Linear(width, llm_hidden_size, **factory),
            nn.GELU(),
            nn.Linear(llm_hidden_size, llm_hidden_size, **factory),
        )

    def forward(self, hidden_states: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Image tokens [B, N * downsample_ratio^2, llm_hidden_size] of a tower's hidden states.

        Args:
            hidden_states: [B, 1 + N, C], class token first.
            grid: (rows, columns) of patches; a square by default.

        Raises:
            ValueError: the tokens do not fit the grid, or the grid the pixel shuffle.
        """
        tokens = hidden_states.shape[1] - 1 if hidden_states.dim() == 3 else -1
        rows, columns = grid or (math.isqrt(max(tokens, 0)),) * 2
        if tokens != rows * columns or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"InternVLConnector: hidden_states must be [batch, 1 + {rows} * {columns}, {self.hidden_size}], "
                f"got {list(hidden_states.shape)}" + ("; give grid where it is no square" if grid is None else "")
            )
        x = hidden_states[:, 1:].unflatten(1, (rows, columns))
        x = pixel_shuffle(x, self.downsample_ratio, self.ps_version).flatten(1, 2)  # [B, N / 4, 4C]
        norm, fc1, fc2 = self.mlp1[0], self.mlp1[1], self.mlp1[3]
        if isinstance(norm, nn.LayerNorm) and is_plain(norm, nn.LayerNorm):
            x = cast_for_linear(layer_norm(x, norm.weight, norm.bias, eps=norm.eps), norm.weight)
        else:
            x = norm(x)
        return linear_per_image(fc2, fc1_gelu(fc1, x))

    def extract_feature(self, vision_model: nn.Module, pixel_values: Tensor, select_layer: int = -1) -> Tensor:
        """Image tokens of pixels, by the formula of upstream's method of this name.

        Args:
            vision_model: an InternViT of this library, OpenGVLab's code or transformers.
            pixel_values: [B, channels, height, width], tiles of one size.
            select_layer: which of the tower's hidden states; -1 is the last.
        """
        if select_layer == -1:
            features = vision_model(pixel_values).last_hidden_state
        else:
            features = vision_model(pixel_values, output_hidden_states=True).hidden_states[select_layer]
        patches = features.shape[1] - 1
        rows = round(math.sqrt(patches * pixel_values.shape[-2] / pixel_values.shape[-1]))
        return self(features, (rows, patches // max(rows, 1)))

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **kwargs: Any) -> "InternVLConnector":
        """The connector out of a whole InternVL's state dict, under either name and any prefix.

        Args:
            state_dict: with `...mlp1.*` or `...multi_modal_projector.*`.
            **kwargs: downsample_ratio, ps_version, device.

        Raises:
            ValueError: none or more than one connector is in it, or keys are missing.
        """
        tensors: dict[str, Tensor] = {}
        for key, tensor in state_dict.items():
            for ours, theirs in _NAMES.items():
                stem, _, leaf = key.rpartition(".")
                if f".{stem}".endswith((f".{ours}", f".{theirs}")):
                    if f"{ours}.{leaf}" in tensors:
                        raise ValueError(f"state_dict: expected one connector, got another at {key}")
                    tensors[f"{ours}.{leaf}"] = tensor
        missing = [
            f"{name}.{leaf}" for name in _NAMES for leaf in ("weight", "bias") if f"{name}.{leaf}" not in tensors
        ]
        if missing:
            raise ValueError(
                f"state_dict: expected mlp1.* or multi_modal_projector.* of InternVL, found no {', '.join(missing)}"
            )
        llm_width, width = tensors["mlp1.1.weight"].shape
        side = round(1 / kwargs.get("downsample_ratio", 0.5))
        with torch.device("meta"):
            connector = cls(width // side**2, llm_width, **{**kwargs, "device": None})
        device = kwargs.get("device")
        connector.load_state_dict({name: tensor.clone().to(device) for name, tensor in tensors.items()}, assign=True)
        return connector.eval()

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> "InternVLConnector":
        """The connector of a whole InternVL's checkpoint; config.json has its downsample_ratio and ps_version.

        Args:
            path: a folder, a file of weights or an index of shards, in any format that `InternViT.from_pretrained`
                reads.
            device: of the parameters.

        Raises:
            FileNotFoundError: no such file, or no weights in the folder.
            ValueError: a broken file, or not one whole connector.
        """
        path = Path(path)
        stems = [f".{name}." for pair in _NAMES.items() for name in pair]
        tensors = read_tensors(path, lambda key: any(stem in f".{key}" for stem in stems))
        place = (path if path.is_dir() else path.parent) / CONFIG
        config = read_json(place) if place.exists() else {}
        settings = {name: config[name] for name in ("downsample_ratio", "ps_version") if name in config}
        return cls.from_state_dict(tensors, **settings, device=device)

    def to_state_dict(self, layout: str = "opengvlab") -> dict[str, Tensor]:
        """The state dict under "opengvlab" (`mlp1.*`) or "transformers" (`multi_modal_projector.*`) names."""
        if layout not in ("opengvlab", "transformers"):
            raise ValueError(f"layout: expected opengvlab or transformers, got {layout!r}")
        tensors = self.state_dict()
        if layout == "opengvlab":
            return tensors
        return {f"{_NAMES[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": t for key, t in tensors.items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for ours, theirs in _NAMES.items():
            for leaf in ("weight", "bias"):
                if f"{prefix}{theirs}.{leaf}" in state_dict:
                    state_dict[f"{prefix}{ours}.{leaf}"] = state_dict.pop(f"{prefix}{theirs}.{leaf}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"downsample_ratio={self.downsample_ratio}, ps_version={self.ps_version!r}"
