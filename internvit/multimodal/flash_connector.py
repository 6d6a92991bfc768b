"""InternVL3.5-Flash's connector: a router decides for each tile whether the language model gets 256 or 64 tokens.

tokens [B, 1 + N, C] -> router -> compress [B]
where not: pixel shuffle [N / 4, 4C]   -> LayerNorm -> Linear -> GELU -> Linear                      (mlp1)
where so:  pixel shuffle [N / 16, 16C] -> LayerNorm -> Linear -> GELU -> Linear -> GELU -> Linear    (mlp2)
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from internvit.multimodal.connector import (
    PROJECTOR_NAMES,
    InternVLConnector,
    assign_tensors,
    check_select_layer,
    find_tensors,
    patches_of,
    pixel_shuffle,
    read_connector,
    read_settings,
    rename_projector,
    shown_settings,
    tower_features,
)
from internvit.multimodal.fused_sequential import run_sequential
from internvit.multimodal.router import CrossAttentionPooling, Gating, tiles_to_compress

_DROPOUT = 0.1
_THRESHOLDS = ("flash_relative_threshold", "flash_absolute_threshold")


class InternVLFlashOutput(NamedTuple):
    """What the language model gets of B tiles.

    Attributes:
        image_tokens: [T, llm_hidden_size], tile after tile; `image_tokens.split(token_counts)` parts them.
        token_counts: of each tile, N * downsample_ratio^2 or N * downsample_ratio^4 (256 or 64 at 448 px); the prompt
            has as many placeholders.
        compress: bool [B], which tiles have few.
        router_logits: [B, 2], for few tokens and for many; `cross_entropy` of them trains the router.
    """

    image_tokens: Tensor
    token_counts: tuple[int, ...]
    compress: Tensor
    router_logits: Tensor


class InternVLFlashConnector(nn.Module):
    """The connector of InternVL3.5-Flash, with its visual resolution router.

    Args:
        hidden_size: C, the width of the vision tower.
        llm_hidden_size: the width of the language model.
        flash_relative_threshold: a tile gets few tokens if the router's probability for it is above this quantile of
            its sample's tiles, and
        flash_absolute_threshold: at least this. Both stand in the checkpoint's config.json.
        downsample_ratio: of the pixel shuffle with many tokens; the other one's is its square.
        ps_version: as in `InternVLConnector`.
        num_heads: of the router's attention.
        device, dtype: of the parameters.
        select_layer: as in `InternVLConnector`.

    Parameters have OpenGVLab's names (`mlp1`, `mlp2`, `pooling_before_gating`, `gating`). Only the branch that a tile
    takes is computed; upstream computes both for all. A forward waits for the device once, for the router's decision.

    Raises:
        ValueError: a threshold outside of [0, 1], or as for `InternVLConnector`.

    Source: extract_feature_flash and generate_flash in modeling_internvl_chat.py of OpenGVLab/InternVL3_5-8B-Flash.
    """

    def __init__(
        self,
        hidden_size: int,
        llm_hidden_size: int,
        flash_relative_threshold: float,
        flash_absolute_threshold: float,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        num_heads: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        select_layer: int = -1,
    ) -> None:
        super().__init__()
        for name, value in zip(_THRESHOLDS, (flash_relative_threshold, flash_absolute_threshold), strict=True):
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1:
                raise ValueError(f"InternVLFlashConnector: {name} must be a number in [0, 1], got {value!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mlp1 = InternVLConnector(hidden_size, llm_hidden_size, downsample_ratio, ps_version, **factory).mlp1
        width, inner = hidden_size * round(1 / downsample_ratio) ** 4, 2 * llm_hidden_size
        self.mlp2 = nn.Sequential(
            nn.LayerNorm(width, **factory),
            nn.Linear(width, inner, **factory),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(inner, inner, **factory),
            nn.GELU(),
            nn.Dropout(_DROPOUT),
            nn.Linear(inner, llm_hidden_size, **factory),
        )
        self.pooling_before_gating = CrossAttentionPooling(hidden_size, num_heads, **factory)
        self.gating = Gating(hidden_size, **factory)
        self.hidden_size = hidden_size
        self.flash_relative_threshold = float(flash_relative_threshold)
        self.flash_absolute_threshold = float(flash_absolute_threshold)
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.select_layer = check_select_layer("InternVLFlashConnector", select_layer)

    def forward(
        self,
        hidden_states: Tensor,
        grid: tuple[int, int] | None = None,
        num_tiles: Sequence[int] | None = None,
        compress: Tensor | Sequence[bool] | None = None,
    ) -> InternVLFlashOutput:
        """The image tokens of tiles, as many as the router decides.

        Args:
            hidden_states: [B, 1 + N, C] of B tiles, class token first.
            grid: (rows, columns) of patches of a tile; a square by default.
            num_tiles: of each sample, a prompt with its images: the relative threshold is a quantile of one sample's
                tiles. By default all tiles are one sample, as upstream has it.
            compress: bool [B] instead of the router's decision, as in its training.

        Raises:
            ValueError: the tokens do not fit the grid, the grid the pixel shuffles, or the others the number of tiles.
        """
        x = patches_of("InternVLFlashConnector", hidden_states, self.hidden_size, grid)
        tiles = len(x)
        samples = [tiles] if num_tiles is None else [int(number) for number in num_tiles]
        if sum(samples) != tiles or min(samples, default=0) < 0:
            raise ValueError(f"InternVLFlashConnector: num_tiles must add up to {tiles} tiles, got {samples}")
        logits = self.gating(self.pooling_before_gating(hidden_states[:, 1:])).squeeze(1)
        if compress is None:
            probabilities = logits.float().softmax(-1)[:, 0]
            chosen = tiles_to_compress(
                probabilities, samples, self.flash_relative_threshold, self.flash_absolute_threshold
            )
        else:
            chosen = torch.as_tensor(compress, device=x.device)
            if chosen.dtype != torch.bool or chosen.shape != (tiles,):
                raise ValueError(
                    f"InternVLFlashConnector: compress must be bool [{tiles}], got {chosen.dtype} {list(chosen.shape)}"
                )
        few = chosen.tolist()
        many_tokens = self._project(self.mlp1, x, [i for i, is_few in enumerate(few) if not is_few], 1)
        few_tokens = self._project(self.mlp2, x, [i for i, is_few in enumerate(few) if is_few], 2)
        many, fewer = iter(many_tokens), iter(few_tokens)
        # The empty slices tie both branches into the graph: DistributedDataParallel waits for gradients of both.
        pieces = [many_tokens[:0].flatten(0, 1), few_tokens[:0].flatten(0, 1)]
        pieces += [next(fewer) if is_few else next(many) for is_few in few]
        counts = tuple(len(piece) for piece in pieces[2:])
        return InternVLFlashOutput(torch.cat(pieces), counts, chosen, logits)

    def _project(self, mlp: nn.Sequential, x: Tensor, tiles: list[int], power: int) -> Tensor:
        """Image tokens [len(tiles), tokens, llm_hidden_size] of some of the tiles x [B, rows, columns, C]."""
        x = x if len(tiles) == len(x) else x[tiles]
        return run_sequential(mlp, pixel_shuffle(x, self.downsample_ratio**power, self.ps_version).flatten(1, 2))

    def extract_feature(
        self, vision_model: nn.Module, pixel_values: Tensor, num_tiles: Sequence[int] | None = None
    ) -> InternVLFlashOutput:
        """The image tokens of pixels, from the tower's hidden state `select_layer`.

        Args:
            vision_model: an InternViT of this library, OpenGVLab's code or transformers.
            pixel_values: [B, channels, height, width], tiles of one size, sample after sample.
            num_tiles: of each sample; see `forward`.
        """
        features, grid = tower_features(vision_model, pixel_values, self.select_layer)
        return self(features, grid, num_tiles)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor], **kwargs: Any) -> "InternVLFlashConnector":
        """The connector out of a whole InternVL3.5-Flash's state dict, under any prefix.

        Args:
            state_dict: with `mlp1.*` (or `multi_modal_projector.*`), `mlp2.*`, `pooling_before_gating.*`, `gating.*`.
            **kwargs: flash_relative_threshold, flash_absolute_threshold, downsample_ratio, ps_version, select_layer,
                device.

        Raises:
            ValueError: none or more than one connector is in it, or keys are missing.
        """
        tensors = find_tensors(state_dict, _parameter_names())
        llm_width = len(tensors["mlp1.1.weight"])
        with torch.device("meta"):
            connector = cls(tensors["gating.gate.0.weight"].shape[0], llm_width, **{**kwargs, "device": None})
        assign_tensors(connector, tensors, kwargs.get("device"))
        return connector

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        flash_relative_threshold: float | None = None,
        flash_absolute_threshold: float | None = None,
        device: torch.device | str | None = None,
    ) -> "InternVLFlashConnector":
        """The connector of a checkpoint of InternVL3.5-Flash, with the settings of its config.json.

        Args:
            path: as for `InternVLConnector.from_pretrained`.
            flash_relative_threshold, flash_absolute_threshold: instead of those of config.json.
            device: of the parameters.

        Raises:
            FileNotFoundError: no such file, or no weights in the folder.
            ValueError: a broken file, not one whole connector, or thresholds that neither names.
        """
        stems = [f"{root}." for root in ("mlp1", "mlp2", "pooling_before_gating", "gating")]
        tensors, config = read_connector(path, [*stems, *(f"{name}." for name in PROJECTOR_NAMES.values())])
        settings = read_settings(config, (*_THRESHOLDS, "downsample_ratio", "ps_version"))
        given = dict(zip(_THRESHOLDS, (flash_relative_threshold, flash_absolute_threshold), strict=True))
        settings.update({name: value for name, value in given.items() if value is not None})
        absent = [name for name in _THRESHOLDS if name not in settings]
        if absent:
            raise ValueError(f"{path}: expected {' and '.join(absent)} in config.json, or as arguments")
        return cls.from_state_dict(tensors, **settings, device=device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_projector(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        thresholds = ", ".join(f"{name}={getattr(self, name)}" for name in _THRESHOLDS)
        return f"{thresholds}, {shown_settings(self.downsample_ratio, self.ps_version, self.select_layer)}"


def _parameter_names() -> list[str]:
    with torch.device("meta"):
        return list(InternVLFlashConnector(16, 1, 0, 0).state_dict())
