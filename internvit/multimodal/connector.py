"""InternVL's connector between the vision tower and the language model.

    tokens [B, 1 + N, C] -> no class token -> pixel shuffle [B, N / 4, 4C] -> LayerNorm -> Linear -> GELU -> Linear

Pixel shuffle folds each 2x2 square of patches into one token of four times the width. Version "v2" keeps the image's
orientation; "v1", of the first InternVL, swaps rows and columns.
"""

import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvit.checkpoint.files import CONFIG, read_tensors
from internvit.files import read_json
from internvit.multimodal.fused_sequential import run_sequential
from internvit.names import listed

logger = logging.getLogger(__name__)

PS_VERSIONS = ("v1", "v2")
_SELECT_LAYER = ("select_layer", "vision_feature_layer")  # OpenGVLab's name in config.json, and transformers'
_LAYOUTS = ("opengvlab", "transformers")
_EPS = 1e-5
PROJECTOR_NAMES = {  # OpenGVLab's (the parameters' own) and transformers'
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


def patches_of(owner: str, hidden_states: Tensor, hidden_size: int, grid: tuple[int, int] | None) -> Tensor:
    """hidden_states [B, 1 + N, C] as patches [B, rows, columns, C], without the class token.

    Raises:
        ValueError: the tokens do not fit the grid, by default a square; the message names `owner`.
    """
    tokens = hidden_states.shape[1] - 1 if hidden_states.dim() == 3 else -1
    rows, columns = grid or (math.isqrt(max(tokens, 0)),) * 2
    if tokens != rows * columns or hidden_states.shape[-1] != hidden_size:
        raise ValueError(
            f"{owner}: hidden_states must be [batch, 1 + {rows} * {columns}, {hidden_size}], "
            f"got {list(hidden_states.shape)}" + ("; give grid where it is no square" if grid is None else "")
        )
    return hidden_states[:, 1:].unflatten(1, (rows, columns))


def state_index(select_layer: int, blocks: int) -> int:
    """Which of a tower's 1 + `blocks` hidden states `select_layer` names; 0 is the embeddings.

    Raises:
        ValueError: there is no such one.
    """
    if not -blocks - 1 <= select_layer <= blocks:
        raise ValueError(
            f"select_layer: expected a number from {-blocks - 1} to {blocks} of a tower with {blocks} blocks, "
            f"got {select_layer}"
        )
    return select_layer % (blocks + 1)


def tower_features(
    vision_model: nn.Module, pixel_values: Tensor, select_layer: int = -1
) -> tuple[Tensor, tuple[int, int]]:
    """A tower's hidden states [B, 1 + N, C] of pixels [B, channels, height, width], and their (rows, columns)."""
    if select_layer == -1:
        features = vision_model(pixel_values).last_hidden_state
    else:
        states = vision_model(pixel_values, output_hidden_states=True).hidden_states
        features = states[state_index(select_layer, len(states) - 1)]
    patches = features.shape[1] - 1
    rows = round(math.sqrt(patches * pixel_values.shape[-2] / pixel_values.shape[-1]))
    return features, (rows, patches // max(rows, 1))


def find_tensors(state_dict: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a connector out of a whole InternVL's state dict, under OpenGVLab's `names`.

    Raises:
        ValueError: one is missing, or there twice.
    """
    known = {_spelled(name, layout): name for name in names for layout in _LAYOUTS}
    tensors: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        parts = key.split(".")
        name = next((known[tail] for i in range(len(parts)) if (tail := ".".join(parts[i:])) in known), None)
        if name in tensors:
            raise ValueError(f"state_dict: expected one connector, got another at {key}")
        if name is not None:
            tensors[name] = tensor
    missing = [name for name in names if name not in tensors]
    if missing:
        roots = ", ".join(f"{root}.*" for root in dict.fromkeys(name.split(".")[0] for name in names) if root != "mlp1")
        raise ValueError(
            f"state_dict: expected mlp1.* or multi_modal_projector.*{roots and f', {roots}'} of InternVL, "
            f"found no {listed(missing)}"
        )
    return tensors


def read_connector(path: str | os.PathLike[str], stems: Collection[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint whose names begin with one of `stems` behind any prefix, and its config.json."""
    path = Path(path)
    tensors = read_tensors(path, lambda key: any(f".{stem}" in f".{key}" for stem in stems))
    place = (path if path.is_dir() else path.parent) / CONFIG
    return tensors, read_json(place) if place.exists() else {}


def read_settings(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A connector's arguments out of config.json: those of `names` that it has, and select_layer."""
    settings = {name: config[name] for name in names if name in config}
    selected = [config[name] for name in _SELECT_LAYER if name in config]
    return {**settings, "select_layer": selected[0]} if selected else settings


def check_select_layer(owner: str, select_layer: Any) -> int:
    """Raises a ValueError for what is no integer, such as the list that transformers' other models have."""
    if not isinstance(select_layer, int) or isinstance(select_layer, bool):
        raise ValueError(f"{owner}: select_layer must be an integer, got {select_layer!r}")
    return select_layer


def assign_tensors(connector: nn.Module, tensors: Mapping[str, Tensor], device: Any = None) -> None:
    """Gives a connector on the meta device copies of its tensors."""
    connector.load_state_dict({name: tensor.clone().to(device) for name, tensor in tensors.items()}, assign=True)
    connector.eval()


def shown_settings(downsample_ratio: float, ps_version: str, select_layer: int) -> str:
    """For a connector's repr; select_layer where it is not the last."""
    selected = "" if select_layer == -1 else f", select_layer={select_layer}"
    return f"downsample_ratio={downsample_ratio}, ps_version={ps_version!r}{selected}"


def rename_projector(state_dict: dict[str, Any], prefix: str) -> None:
    """Gives mlp1 under `prefix` OpenGVLab's names where it has transformers'."""
    for ours, theirs in PROJECTOR_NAMES.items():
        for leaf in ("weight", "bias"):
            if f"{prefix}{theirs}.{leaf}" in state_dict:
                state_dict[f"{prefix}{ours}.{leaf}"] = state_dict.pop(f"{prefix}{theirs}.{leaf}")


def _spelled(name: str, layout: str) -> str:
    """A parameter's name in a layout; only mlp1 has two."""
    stem, _, leaf = name.rpartition(".")
    return f"{PROJECTOR_NAMES[stem]}.{leaf}" if layout == "transformers" and stem in PROJECTOR_NAMES else name


class InternVLConnector(nn.Module):
    """InternVL's connector: class token dropped, pixel shuffle, LayerNorm and a two-layer MLP.

    Args:
        hidden_size: C, the width of the vision tower.
        llm_hidden_size: the width of the language model.
        downsample_ratio: of the pixel shuffle.
        ps_version: "v2", or "v1" for the first InternVL (the default of upstream's class, used by two of its recipes).
        device, dtype: of the parameters.
        select_layer: which of the tower's hidden states it was trained on, for whoever pairs it with a tower: -1 the
            last, -4 in InternVL-Chat-V1-1. `forward` takes what it is given.

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
        select_layer: int = -1,
    ) -> None:
        super().__init__()
        if ps_version not in PS_VERSIONS:
            raise ValueError(f"InternVLConnector: ps_version must be one of 'v1', 'v2', got {ps_version!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        width = hidden_size * round(1 / downsample_ratio) ** 2
        self.hidden_size = hidden_size
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.select_layer = check_select_layer("InternVLConnector", select_layer)
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
        x = patches_of("InternVLConnector", hidden_states, self.hidden_size, grid)
        x = pixel_shuffle(x, self.downsample_ratio, self.ps_version).flatten(1, 2)  # [B, N / 4, 4C]
        return run_sequential(self.mlp1, x)

    def extract_feature(self, vision_model: nn.Module, pixel_values: Tensor, select_layer: int | None = None) -> Tensor:
        """Image tokens of pixels, by the formula of upstream's method of this name.

        Args:
            vision_model: an InternViT of this library, OpenGVLab's code or transformers.
            pixel_values: [B, channels, height, width], tiles of one size.
            select_layer: which of the tower's hidden states, -1 the last; by default the connector's own.

        Raises:
            ValueError: as `forward`, or the tower has no such hidden state.
        """
        selected = self.select_layer if select_layer is None else select_layer
        return self(*tower_features(vision_model, pixel_values, selected))

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **kwargs: Any) -> "InternVLConnector":
        """The connector out of a whole InternVL's state dict, under either name and any prefix.

        Args:
            state_dict: with `...mlp1.*` or `...multi_modal_projector.*`.
            **kwargs: downsample_ratio, ps_version, select_layer, device.

        Raises:
            ValueError: none or more than one connector is in it, or keys are missing.
        """
        tensors = find_tensors(
            state_dict, [f"{name}.{leaf}" for name in PROJECTOR_NAMES for leaf in ("weight", "bias")]
        )
        llm_width, width = tensors["mlp1.1.weight"].shape
        side = round(1 / kwargs.get("downsample_ratio", 0.5))
        with torch.device("meta"):
            connector = cls(width // side**2, llm_width, **{**kwargs, "device": None})
        assign_tensors(connector, tensors, kwargs.get("device"))
        return connector

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None
    ) -> "InternVLConnector":
        """The connector of a whole InternVL's checkpoint, with the settings of its config.json.

        These are downsample_ratio, ps_version and select_layer (transformers: vision_feature_layer).

        Args:
            path: a folder, a file of weights or an index of shards, in any format that `InternViT.from_pretrained`
                reads.
            device: of the parameters.

        Raises:
            FileNotFoundError: no such file, or no weights in the folder.
            ValueError: a broken file, not one whole connector, or a select_layer that is no integer.
        """
        tensors, config = read_connector(path, [f"{name}." for pair in PROJECTOR_NAMES.items() for name in pair])
        if config.get("flash_mode"):
            logger.warning("%s: an InternVL3.5-Flash; without InternVLFlashConnector every tile keeps all tokens", path)
        return cls.from_state_dict(tensors, **read_settings(config, ("downsample_ratio", "ps_version")), device=device)

    def to_state_dict(self, layout: str = "opengvlab") -> dict[str, Tensor]:
        """The state dict under "opengvlab" (`mlp1.*`) or "transformers" (`multi_modal_projector.*`) names."""
        if layout not in _LAYOUTS:
            raise ValueError(f"layout: expected opengvlab or transformers, got {layout!r}")
        return {_spelled(key, layout): tensor for key, tensor in self.state_dict().items()}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_projector(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return shown_settings(self.downsample_ratio, self.ps_version, self.select_layer)
