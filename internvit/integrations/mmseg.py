"""InternViT for mmsegmentation and mmdetection: importing this module registers it where they are installed.

    custom_imports = dict(imports=["internvit.integrations.mmseg"])
    model = dict(backbone=dict(type="InternViTBackbone", config="internvit-300m-448px-v2.5", image_size=504,
                               out_indices=[7, 11, 15, 23], fpn=True, freeze=True, pretrained="checkpoint.pth"))

A config file holds plain values, so the architecture is a name or a dict here, and dtypes are strings.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from internvit.config import InternViTConfig
from internvit.dense.backbone import InternViTBackbone

REGISTRIES = ("mmseg.registry", "mmdet.registry")


class MMSegInternViT(InternViTBackbone):
    """`InternViTBackbone` made of a config file's values; mmengine's `init_weights` loads the checkpoint.

    Args:
        config: the checkpoint's architecture, a published variant's name or a dict for `InternViTConfig.from_dict`.
        pretrained: a checkpoint of any layout, loaded by `init_weights`. `init_cfg=dict(type="Pretrained",
            checkpoint=...)`, as mmengine spells it, means the same.
        image_size, patch_size, drop_path_rate: of the model to build, where they are not `config`'s; the checkpoint's
            embeddings are resampled to them.
        patch_resampling: see `internvit.checkpoint.resample.resample_patch_embedding`.
        dtype, out_dtype: names, such as "bfloat16".
        with_cp: mmseg's name for gradient_checkpointing="block".
        out_indices, fpn, final_norm, freeze, rounding, device: as in `InternViTBackbone`.

    Raises:
        ValueError: no such variant, type of initialisation or dtype.
    """

    def __init__(
        self,
        config: str | Mapping[str, Any],
        pretrained: str | os.PathLike[str] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int | None = None,
        drop_path_rate: float | None = None,
        patch_resampling: str = "bicubic",
        dtype: str | None = None,
        out_dtype: str | None = "float32",
        with_cp: bool = False,
        out_indices: Sequence[int] = (7, 11, 15, 23),
        fpn: bool = False,
        final_norm: bool = False,
        freeze: bool = False,
        rounding: str = "fused",
        device: str | None = None,
    ) -> None:
        made = InternViTConfig.from_name(config) if isinstance(config, str) else InternViTConfig.from_dict(config)
        patch = patch_size or made.patch_size
        rows, columns = made.grid_size
        architecture = made.replace(
            image_size=image_size or (rows * patch, columns * patch),
            patch_size=patch,
            drop_path_rate=made.drop_path_rate if drop_path_rate is None else drop_path_rate,
        )
        super().__init__(
            architecture,
            out_indices,
            fpn,
            final_norm,
            freeze,
            gradient_checkpointing="block" if with_cp else "none",
            out_dtype=_dtype(out_dtype),
            rounding=rounding,
            device=device,
            dtype=_dtype(dtype),
        )
        self.pretrained_config = made
        if init_cfg is not None and init_cfg.get("type") != "Pretrained":
            raise ValueError(f"init_cfg: expected type 'Pretrained', got {init_cfg.get('type')!r}")
        self.pretrained = pretrained if init_cfg is None else init_cfg["checkpoint"]
        self.patch_resampling = patch_resampling

    def init_weights(self) -> None:
        """Loads `pretrained`; without one the random weights stay."""
        if self.pretrained is None:
            return
        parameter = self.embeddings.position_embedding
        loaded = InternViTBackbone.from_pretrained(
            self.pretrained,
            self.out_indices,
            self.fpn,
            "up3.1.weight" in self.state_dict(),  # final_norm
            config=self.pretrained_config,
            dtype=parameter.dtype,
            image_size=self.config.image_size,
            patch_size=self.config.patch_size,
            patch_resampling=self.patch_resampling,
        )
        self.load_state_dict(loaded.state_dict())


def _dtype(name: str | None) -> torch.dtype | None:
    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: expected a name such as 'bfloat16', got {name!r}")
    return dtype


def register() -> list[str]:
    """Registers "InternViTBackbone" in the registries that are installed, and names them; once is enough.

    Raises:
        ImportError: neither mmseg nor mmdet is installed.
    """
    registered = []
    for name in REGISTRIES:
        try:
            registry = importlib.import_module(name)
        except ImportError:
            continue
        registry.MODELS.register_module(name="InternViTBackbone", module=MMSegInternViT, force=True)
        registered.append(name)
    if not registered:
        raise ImportError(
            "internvit.integrations.mmseg: neither mmseg nor mmdet is installed (mmseg.registry, mmdet.registry)"
        )
    return registered


register()
