"""InternViT as a backbone for dense prediction: maps [B, C, h, w] after chosen blocks, and the feature pyramid."""

import contextlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvit.config import InternViTConfig
from internvit.dense.pyramid import FeaturePyramid
from internvit.geometry import feature_map
from internvit.model.embeddings import Embeddings
from internvit.model.encoder import InternViTEncoder
from internvit.model.packed import pack_images
from internvit.model.vit import InternViT

logger = logging.getLogger("internvit")

_PYRAMID = re.compile(r"(?:.*\.)?(up[1-4]\..*)")


def _block_indices(out_indices: Sequence[int], layers: int) -> tuple[int, ...]:
    """Numbers of blocks from 0, negative ones counted from the end, as timm does."""
    blocks = tuple(i + layers if i < 0 else i for i in out_indices)
    if not blocks or any(not 0 <= i < layers for i in blocks) or list(blocks) != sorted(set(blocks)):
        raise ValueError(
            f"out_indices: expected ascending numbers of blocks between 0 and {layers - 1} (or negative, from the "
            f"end), got {tuple(out_indices)}"
        )
    return blocks


class InternViTBackbone(nn.Module):
    """Maps of an InternViT after chosen blocks, class token dropped: the form that segmentation and detection take.

    maps[i] = block out_indices[i]'s tokens 1…N as [B, C, H / patch, W / patch]

    Blocks past the last index are not built. Parameters have the names of `InternViT`'s, the pyramid's upstream's
    (`up1.0.weight`, …). Source: OpenGVLab/InternVL, segmentation/mmseg_custom/models/backbones/intern_vit_6b.py.

    Args:
        config: the architecture.
        out_indices: after which blocks, 0 the first, -1 the last; (7, 11, 15, 23) are the 300M's.
        fpn: end in `FeaturePyramid`: four levels of 4, 2, 1 and 1/2 times the map; needs four indices.
        final_norm: a LayerNorm at the end of each level of the pyramid.
        freeze: the tower's parameters take no gradient and its forward keeps no graph; it stays in eval mode.
        gradient_checkpointing: "none", "selective" or "block"; see `InternViT.set_gradient_checkpointing`.
        out_dtype: of the maps; by default the tower's. Upstream returns float32.
        rounding, device, dtype: as in `InternViT`. The pyramid has the same dtype.

    Raises:
        ValueError: indices that are no blocks, not ascending, or not four with `fpn`; `final_norm` without `fpn`.

    Example:
        >>> backbone = internvit.InternViTBackbone.from_pretrained(path, out_indices=(7, 11, 15, 23), fpn=True)
        >>> quarter, eighth, sixteenth, thirtysecond = backbone(pixels)
    """

    def __init__(
        self,
        config: InternViTConfig,
        out_indices: Sequence[int] = (7, 11, 15, 23),
        fpn: bool = False,
        final_norm: bool = False,
        freeze: bool = False,
        gradient_checkpointing: str = "none",
        out_dtype: torch.dtype | None = None,
        rounding: str = "fused",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_indices = _block_indices(out_indices, config.num_hidden_layers)
        if fpn and len(self.out_indices) != 4:
            raise ValueError(f"fpn: the pyramid takes four maps, out_indices has {len(self.out_indices)}")
        if final_norm and not fpn:
            raise ValueError("final_norm: it is the end of the pyramid's levels, and fpn is False")
        self.config = config
        self.embeddings = Embeddings(config, device=device)
        self.encoder = InternViTEncoder(config, rounding, self.out_indices[-1] + 1, device=device)
        self.fpn = fpn
        if fpn:  # upstream's names stand beside the tower's: up1.0.weight, …
            for name, level in FeaturePyramid(config.hidden_size, final_norm).to(device=device).named_children():
                self.add_module(name, level)
        if dtype is not None:
            self.to(dtype)
        self.out_dtype, self.freeze = out_dtype, freeze
        self.encoder.set_gradient_checkpointing(gradient_checkpointing)
        if freeze:
            self.embeddings.requires_grad_(False)
            self.encoder.requires_grad_(False)
        self.train(self.training)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each map."""
        return (self.config.hidden_size,) * len(self.out_indices)

    @property
    def strides(self) -> tuple[float, ...]:
        """Pixels a cell of each map stands for, in each direction."""
        patch = float(self.config.patch_size)
        return (patch / 4, patch / 2, patch, patch * 2) if self.fpn else (patch,) * len(self.out_indices)

    def train(self, mode: bool = True) -> "InternViTBackbone":
        """Training mode, in which a frozen tower stays in eval mode."""
        super().train(mode)
        if self.freeze:
            self.embeddings.eval()
            self.encoder.eval()
        return self

    def forward(self, pixel_values: Any) -> tuple[Any, ...]:
        """Maps of a batch of images, or of a list of images of any sizes: each is then a list of [C, h, w].

        Args:
            pixel_values: [B, channels, height, width], multiples of the patch size; cast to the weights' dtype. Or a
                list of images [channels, height, width].

        Raises:
            ValueError: a wrong shape, number of channels, or a size off the patch grid.
        """
        if isinstance(pixel_values, (list, tuple)):
            return self._packed_maps(pixel_values)
        size = self.config.patch_size
        with torch.no_grad() if self.freeze else contextlib.nullcontext():
            hidden_states = self.encoder(self.embeddings(pixel_values), indices=self.out_indices)[1]
        grid = (pixel_values.shape[2] // size, pixel_values.shape[3] // size)
        return self._levels([feature_map(x, grid) for x in hidden_states])

    def _levels(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        if self.fpn:
            dtype = self.get_parameter("up1.0.weight").dtype  # maps of a float32 residual stream are float32
            maps = [self.get_submodule(f"up{i}")(x.to(dtype)) for i, x in enumerate(maps, 1)]
        return tuple(maps if self.out_dtype is None else (x.to(self.out_dtype) for x in maps))

    def _packed_maps(self, images: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
        with torch.no_grad() if self.freeze else contextlib.nullcontext():
            packed = pack_images(self.embeddings, images)
            states = self.encoder(packed.values, indices=self.out_indices, sequences=packed.sequences)[1]
        by_image = zip(*(packed.with_values(x).maps() for x in states), strict=True)
        levels = [[x[0] for x in self._levels([m[None] for m in maps])] for maps in by_image]
        return tuple(map(list, zip(*levels, strict=True)))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        out_indices: Sequence[int] = (7, 11, 15, 23),
        fpn: bool = False,
        final_norm: bool = False,
        freeze: bool = False,
        gradient_checkpointing: str = "none",
        out_dtype: torch.dtype | None = None,
        rounding: str = "fused",
        **loading: Any,
    ) -> "InternViTBackbone":
        """A backbone with a checkpoint's weights, in eval mode; any layout that `InternViT.from_pretrained` reads.

        A pyramid in the checkpoint (`up1…up4` of mmseg's backbones) is loaded strictly with `fpn`; without one there
        it keeps its initial values, and that is logged.

        Args:
            out_indices to rounding: as in the constructor.
            name_or_path, loading: those of `InternViT.from_pretrained`.
        """
        from internvit.checkpoint.hub import locate

        hub = {
            name: loading.pop(name)
            for name in ("revision", "cache_dir", "token", "local_files_only")
            if name in loading
        }
        path = locate(name_or_path, **hub, prefix=loading.get("prefix"))
        model = InternViT.from_pretrained(path, **loading)
        return cls.from_model(
            model, path, out_indices, fpn, final_norm, freeze, gradient_checkpointing, out_dtype, rounding
        )

    @classmethod
    def from_model(
        cls,
        model: InternViT,
        pyramid: str | os.PathLike[str] | None = None,
        out_indices: Sequence[int] = (7, 11, 15, 23),
        fpn: bool = False,
        final_norm: bool = False,
        freeze: bool = False,
        gradient_checkpointing: str = "none",
        out_dtype: torch.dtype | None = None,
        rounding: str = "fused",
        *,
        prefix: str | None = None,
    ) -> "InternViTBackbone":
        """A backbone of the parameters of `model`, shared.

        Its residual_dtype and folding of LayerScale are taken over; the pyramid of a float32 stream is float32.

        Args:
            model: kept as it is.
            pyramid: a local checkpoint that may hold the pyramid's parameters.
            prefix: as in `from_pretrained`, of the tower in that checkpoint.
            out_indices to rounding: as in the constructor.
        """
        settings = out_indices, fpn, final_norm, freeze, gradient_checkpointing, out_dtype, rounding
        backbone = cls(model.config, *settings, device="meta")
        expected = backbone.state_dict()
        weights = {k: v for k, v in model.state_dict(keep_vars=True).items() if k in expected}
        if fpn:
            levels = FeaturePyramid(model.config.hidden_size, final_norm)
            stored = {} if pyramid is None else _pyramid_of(pyramid, prefix)
            if stored:
                try:
                    levels.load_state_dict(stored)
                except RuntimeError as error:
                    raise ValueError(f"{pyramid}: its feature pyramid does not fit: {error}") from error
            else:
                logger.warning("%s: no feature pyramid there; it keeps its initial values", pyramid or "model")
            weights |= levels.to(model.device, model.residual_dtype or model.dtype).state_dict(keep_vars=True)
        backbone.load_state_dict(weights, assign=True)
        backbone.encoder.residual_dtype = model.residual_dtype
        backbone.encoder.set_layer_scale_folding(model.encoder.options.fold_layer_scale)
        if freeze:
            backbone.embeddings.requires_grad_(False)
            backbone.encoder.requires_grad_(False)
        return backbone.train(model.training)


def _pyramid_of(path: str | os.PathLike[str], prefix: str | None) -> dict[str, Tensor]:
    """The parameters `up1…up4` of a local checkpoint; empty if there are none."""
    from internvit.checkpoint.files import Checkpoint

    with Checkpoint(Path(path), prefix, with_config=False) as checkpoint:
        names = {match[1]: key for key in checkpoint.keys if (match := _PYRAMID.fullmatch(key))}
        return {name: checkpoint.file(checkpoint.keys[key]).read(key).clone() for name, key in names.items()}
