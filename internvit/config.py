"""InternViT's configuration, and every published variant by name.

Reads each upstream's spelling: OpenGVLab's `config.json` (older ones lack `norm_type`), a whole InternVL `config.json`
with its `vision_config`, transformers' `InternVLVisionConfig`, and the constructor arguments of the mmseg/mmdet
backbones and of timm. Keys that do not describe the vision tower are ignored, as upstream's parsers do.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvit.files import read_json
from internvit.names import (
    CONFIG_DEFAULTS,
    CONFIG_FIELDS,
    LAYOUTS,
    MODEL_TYPE_DEFAULTS,
    TIMM_ARCHITECTURES,
    TRANSFORMERS_FIELDS,
    TRANSFORMERS_MODEL_TYPES,
)

_TIMM_ARGUMENTS = ("embed_dim", "depth", "num_heads", "in_chans", "init_values")
NORM_TYPES = ("rms_norm", "layer_norm")
POS_EMBED_MODES = ("float32", "param_dtype", "antialias", "static")


@dataclass(frozen=True)
class InternViTConfig:
    """The architecture of one InternViT.

    Args:
        num_channels: of the pixels.
        patch_size: side of a square patch, in pixels.
        image_size: native height and width in pixels, an int for square images; fixes the stored position embedding.
        hidden_size: width C.
        num_hidden_layers: number of blocks.
        num_attention_heads: H; C must be a multiple of it.
        intermediate_size: width of the MLP.
        norm_type: "rms_norm" (6B) or "layer_norm" (300M).
        layer_norm_eps: of the block norms, whatever their type.
        qkv_bias: whether the packed qkv projection has a bias.
        qk_normalization: RMSNorm of q and of k over the whole width, all heads together.
        qk_norm_eps: of QK-norm; None takes layer_norm_eps (transformers has 1e-6 always).
        drop_path_rate: of the last block; it grows linearly from 0 at the first.
        initializer_factor: initial value of LayerScale.
        initializer_range: standard deviation of the initial weights.
        pos_embed_mode: how the position embedding is resized to another grid: "float32" (OpenGVLab: bicubic in
            float32), "param_dtype" (transformers: bicubic in the parameter's dtype), "antialias" (timm: bicubic in
            float32 with antialias), "static" (mmseg: never).
        name: of the published variant, if it is one.

    Raises:
        ValueError: a value that no InternViT can have, naming the field.

    Source: configuration_intern_vit.py of OpenGVLab/InternVL.
    """

    num_channels: int = 3
    patch_size: int = 14
    image_size: int | tuple[int, int] = 224
    hidden_size: int = 3200
    num_hidden_layers: int = 48
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_normalization: bool = True
    qk_norm_eps: float | None = None
    drop_path_rate: float = 0.0
    initializer_factor: float = 0.1
    initializer_range: float = 0.02
    pos_embed_mode: str = "float32"
    name: str | None = None

    def __post_init__(self) -> None:
        for field in ("num_channels", "patch_size", "hidden_size", "num_attention_heads", "intermediate_size"):
            self._require(field, _is_int(getattr(self, field), 1), "a positive int")
        self._require("num_hidden_layers", _is_int(self.num_hidden_layers, 0), "an int >= 0")
        for field in ("layer_norm_eps", "drop_path_rate", "initializer_factor", "initializer_range"):
            self._require(field, _is_number(getattr(self, field)), "a finite number")
            object.__setattr__(self, field, float(getattr(self, field)))  # JSON writers give 1 for 1.0
        self._require("qk_norm_eps", self.qk_norm_eps is None or _is_number(self.qk_norm_eps), "a number >= 0 or None")
        for field in ("qkv_bias", "qk_normalization"):
            self._require(field, isinstance(getattr(self, field), bool), "True or False")
        self._require("name", self.name is None or isinstance(self.name, str), "a string or None")
        self._require("norm_type", self.norm_type in NORM_TYPES, f"one of {', '.join(NORM_TYPES)}")
        self._require("pos_embed_mode", self.pos_embed_mode in POS_EMBED_MODES, f"one of {', '.join(POS_EMBED_MODES)}")
        self._require("layer_norm_eps", self.layer_norm_eps >= 0, "a number >= 0")
        if self.qk_norm_eps is not None:
            self._require("qk_norm_eps", self.qk_norm_eps >= 0, "a number >= 0 or None")
            object.__setattr__(self, "qk_norm_eps", float(self.qk_norm_eps))
        self._require("drop_path_rate", 0 <= self.drop_path_rate < 1, "in [0, 1)")
        self._require("initializer_range", self.initializer_range >= 0, "a number >= 0")
        heads = self.num_attention_heads
        self._require("hidden_size", self.hidden_size % heads == 0, f"a multiple of num_attention_heads={heads}")
        size = self.image_size
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        fits = len(sides) == 2 and all(_is_int(side, 1) and side % self.patch_size == 0 for side in sides)
        self._require("image_size", fits, f"one or two positive multiples of patch_size={self.patch_size}")
        object.__setattr__(self, "image_size", sides[0] if sides[0] == sides[1] else sides)

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"InternViTConfig: {field} must be {expected}, got {getattr(self, field)!r}")

    @property
    def image_hw(self) -> tuple[int, int]:
        """Native (height, width) in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Native (rows, columns) of patches."""
        height, width = self.image_hw
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens at the native size: patches plus the class token."""
        rows, columns = self.grid_size
        return rows * columns + 1

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def effective_qk_norm_eps(self) -> float:
        return self.layer_norm_eps if self.qk_norm_eps is None else self.qk_norm_eps

    def drop_path_rates(self) -> list[float]:
        """The drop probability of each block, in plain Python, so that a model can be built on the meta device."""
        last = max(self.num_hidden_layers - 1, 1)
        return [self.drop_path_rate * layer / last for layer in range(self.num_hidden_layers)]

    def num_parameters(self) -> int:
        """Exact number of parameters."""
        return sum(math.prod(shape) for shape in self.parameter_shapes().values())

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter, under OpenGVLab's name."""
        width, inner, patch = self.hidden_size, self.intermediate_size, self.patch_size
        norm_bias = self.norm_type == "layer_norm"
        layer: dict[str, tuple[int, ...]] = {
            "norm1.weight": (width,),
            **({"norm1.bias": (width,)} if norm_bias else {}),
            "attn.qkv.weight": (3 * width, width),
            **({"attn.qkv.bias": (3 * width,)} if self.qkv_bias else {}),
            **({"attn.q_norm.weight": (width,), "attn.k_norm.weight": (width,)} if self.qk_normalization else {}),
            "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,),
            "norm2.weight": (width,),
            **({"norm2.bias": (width,)} if norm_bias else {}),
            "mlp.fc1.weight": (inner, width),
            "mlp.fc1.bias": (inner,),
            "mlp.fc2.weight": (width, inner),
            "mlp.fc2.bias": (width,),
            "ls1": (width,),
            "ls2": (width,),
        }
        return {
            "embeddings.class_embedding": (1, 1, width),
            "embeddings.position_embedding": (1, self.num_tokens, width),
            "embeddings.patch_embedding.weight": (width, self.num_channels, patch, patch),
            "embeddings.patch_embedding.bias": (width,),
            **{f"encoder.layers.{i}.{name}": s for i in range(self.num_hidden_layers) for name, s in layer.items()},
        }

    def replace(self, **changes: Any) -> "InternViTConfig":
        """A copy with some fields changed; it is no published variant, unless `name` says so."""
        return dataclasses.replace(self, **{**({"name": None} if changes else {}), **changes})

    def to_dict(self, spelling: str = "opengvlab") -> dict[str, Any]:
        """The configuration under an upstream's keys, as JSON can hold it; `from_dict` reads it back.

        What transformers has no key for (drop path, how the position embedding is resized) stands under ours, which it
        keeps and does not use. timm and mmseg get a file that names no model type of transformers, which
        would take the weights for its own and start with random ones.

        Args:
            spelling: "opengvlab", "transformers", "timm" or "mmseg".

        Raises:
            ValueError: another spelling, or QK-norm with an eps other than the 1e-6 which transformers always takes.
        """
        if spelling not in LAYOUTS:
            raise ValueError(f"InternViTConfig: spelling must be one of {', '.join(LAYOUTS)}, got {spelling!r}")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if isinstance(self.image_size, tuple):
            fields["image_size"] = list(self.image_size)
        if spelling == "opengvlab":
            names = {"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], "hidden_act": "gelu"}
            return {**names, **fields}
        if spelling == "mmseg":
            return {"layout": "mmseg", "internvit": fields}
        if spelling == "timm":
            return {**self._timm_fields(), "internvit": fields}
        if self.qk_normalization and self.effective_qk_norm_eps != 1e-6:
            raise ValueError(
                f"InternViTConfig: qk_norm_eps must be 1e-6 for transformers, got {self.effective_qk_norm_eps}"
            )
        renames = {ours: theirs for theirs, ours in TRANSFORMERS_FIELDS.items()}
        fields = {renames.get(key, key): value for key, value in fields.items()}
        fields["image_size"] = list(self.image_hw)
        fields["patch_size"] = [self.patch_size, self.patch_size]
        names = {"model_type": "internvl_vision", "architectures": ["InternVLVisionModel"], "hidden_act": "gelu"}
        return {**names, "qk_norm_eps": None, **fields}

    def _timm_fields(self) -> dict[str, Any]:
        """What `timm.create_model("local-dir:FOLDER")` reads."""
        arguments = {theirs: getattr(self, ours) for theirs, ours in CONFIG_FIELDS.items() if theirs in _TIMM_ARGUMENTS}
        arguments |= {"img_size": list(self.image_hw), "mlp_ratio": self.intermediate_size / self.hidden_size}
        arguments |= {"patch_size": self.patch_size, "qkv_bias": self.qkv_bias, "final_norm": False}
        described = {"tag": "", "input_size": [self.num_channels, *self.image_hw], "fixed_input_size": True}
        return {
            "architecture": next(iter(TIMM_ARCHITECTURES)),
            "num_classes": 0,
            "global_pool": "token",
            "model_args": arguments,
            "pretrained_cfg": {**described, "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"},
        }

    @classmethod
    def from_name(cls, name: str, **changes: Any) -> "InternViTConfig":
        """A published variant by its registry name or hub id.

        Raises:
            ValueError: no such name; the message lists the known ones.
        """
        known = {**VARIANTS, **{hub_id: VARIANTS[variant] for variant, hub_id in HUB_IDS.items()}}
        if name not in known:
            raise ValueError(f"InternViTConfig: name must be one of {', '.join(VARIANTS)}, got {name!r}")
        return known[name].replace(**changes)

    @classmethod
    def from_json(cls, path: str | Path) -> "InternViTConfig":
        """Reads a `config.json`, of the vision tower or of a whole InternVL model.

        Raises:
            ValueError: not a JSON object, or an impossible value; the message names the file.
        """
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise ValueError(f"{path}: InternViTConfig must be a JSON object, got {type(fields).__name__}")
        try:
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "InternViTConfig":
        """Reads any upstream's spelling; unknown keys are ignored, missing ones take that upstream's defaults.

        Raises:
            ValueError: a feature that InternViT does not have here (dropout, per-head QK-norm, a final norm, another
                activation), or an impossible value; the message names the key.
        """
        fields = _tower_fields(fields)
        spelling = _spelling_of(fields)
        _refuse_unsupported(fields, spelling)
        known = {f.name for f in dataclasses.fields(cls)}
        renamed = {CONFIG_FIELDS.get(key, key): value for key, value in fields.items()}
        given = {k: v for k, v in renamed.items() if k in known and (v is not None or k == "qk_norm_eps")}
        of_family = MODEL_TYPE_DEFAULTS.get(str(fields.get("model_type")), {})
        values = {**CONFIG_DEFAULTS[spelling], **of_family, **given}
        if spelling in ("mmseg", "timm") and "intermediate_size" not in given:
            values["intermediate_size"] = _intermediate_size(
                values.get("hidden_size", 3200), fields.get("mlp_ratio", 4)
            )
        patch = values.get("patch_size")
        if isinstance(patch, list | tuple):
            if not patch or any(side != patch[0] for side in patch):
                raise ValueError(f"InternViTConfig: patch_size must be square, got {patch!r}")
            values["patch_size"] = patch[0]
        if not isinstance(values.get("name"), str):  # not ours: a stray key
            values.pop("name", None)
        return cls(**values)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _intermediate_size(hidden_size: Any, mlp_ratio: Any) -> int:
    if not _is_number(mlp_ratio) or mlp_ratio <= 0:
        raise ValueError(f"InternViTConfig: mlp_ratio must be a positive number, got {mlp_ratio!r}")
    if not _is_int(hidden_size, 1) or not _is_number(hidden_size):
        raise ValueError(f"InternViTConfig: hidden_size must be a positive int, got {hidden_size!r}")
    product = hidden_size * mlp_ratio
    if not _is_number(product):
        raise ValueError(f"InternViTConfig: mlp_ratio must be a number whose MLP has a finite width, got {mlp_ratio!r}")
    return int(product)


def _tower_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that describe the vision tower, out of a whole model's configuration or timm's."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"InternViTConfig: expected a mapping of fields, got {type(fields).__name__}")
    fields = dict(fields)
    while fields.get("vision_config") is not None:
        if not isinstance(fields["vision_config"], Mapping):
            got = type(fields["vision_config"]).__name__
            raise ValueError(f"InternViTConfig: vision_config must be a mapping, got {got}")
        fields = dict(fields["vision_config"])
    if isinstance(fields.get("internvit"), Mapping):  # ours, beside what timm reads
        return dict(fields["internvit"])
    if "architecture" not in fields:
        return fields
    architecture, arguments = fields["architecture"], fields.get("model_args") or {}  # timm's hub repositories
    if not isinstance(architecture, str) or architecture not in TIMM_ARCHITECTURES:
        known = ", ".join(TIMM_ARCHITECTURES)
        raise ValueError(f"InternViTConfig: architecture must be one of {known}, got {architecture!r}")
    if not isinstance(arguments, Mapping):
        raise ValueError(f"InternViTConfig: model_args must be a mapping, got {type(arguments).__name__}")
    return {**TIMM_ARCHITECTURES[architecture], **arguments}


def _spelling_of(fields: Mapping[str, Any]) -> str:
    if str(fields.get("model_type")) in TRANSFORMERS_MODEL_TYPES or fields.keys() & {"attention_bias", "use_qk_norm"}:
        return "transformers"
    mmseg = {"qk_normalization", "pretrain_size", "use_flash_attn", "with_cp", "freeze_vit", "out_indices"}
    if fields.keys() & {"embed_dim", "depth", "num_heads", "img_size"} or fields.get("type") == "InternViT6B":
        return "mmseg" if fields.keys() & mmseg or fields.get("type") == "InternViT6B" else "timm"
    return "opengvlab"


def _refuse_unsupported(fields: Mapping[str, Any], spelling: str) -> None:
    model_type = str(fields.get("model_type") or "intern_vit_6b")
    if not model_type.startswith(("intern_vit", *TRANSFORMERS_MODEL_TYPES)):
        raise ValueError(
            f"InternViTConfig: model_type must be intern_vit_6b or {', '.join(TRANSFORMERS_MODEL_TYPES)}, or a whole "
            f"model's with its vision_config, got {model_type!r}"
        )
    dropouts = ("dropout", "attention_dropout", "hidden_dropout_prob", "projection_dropout", "proj_drop_rate")
    refusals = [(key, fields[key], "0") for key in dropouts if fields.get(key)]
    if fields.get("hidden_act", "gelu") != "gelu":
        refusals.append(("hidden_act", fields["hidden_act"], "'gelu' (exact erf)"))
    if spelling == "transformers":
        for key, wanted in (("use_mean_pooling", True), ("use_absolute_position_embeddings", True)):
            if fields.get(key, wanted) != wanted:
                refusals.append((key, fields[key], repr(wanted)))
    if spelling == "timm":
        for key in ("qk_norm", "final_norm"):
            if fields.get(key):
                refusals.append((key, fields[key], "False"))
    if refusals:
        key, value, expected = refusals[0]
        raise ValueError(f"InternViTConfig: {key} must be {expected} for an InternViT, got {value!r}")


def _variants() -> dict[str, InternViTConfig]:
    six_billion = InternViTConfig(initializer_range=1e-10)
    small = InternViTConfig(
        image_size=448,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        norm_type="layer_norm",
        qkv_bias=True,
        qk_normalization=False,
        drop_path_rate=0.1,
        initializer_factor=1.0,
    )
    variants = {
        "internvit-6b-224px": six_billion,
        "internvit-6b-448px-v1.0": six_billion.replace(image_size=448),
        "internvit-6b-448px-v1.2": six_billion.replace(image_size=448, num_hidden_layers=45),
        "internvit-6b-448px-v1.5": six_billion.replace(image_size=448, num_hidden_layers=45),
        "internvit-6b-448px-v2.5": six_billion.replace(image_size=448, num_hidden_layers=45),
        "internvit-300m-448px": small,
        "internvit-300m-448px-v2.5": small,
    }
    return {name: config.replace(name=name) for name, config in variants.items()}


VARIANTS: dict[str, InternViTConfig] = _variants()
HUB_IDS: dict[str, str] = {
    "internvit-6b-224px": "OpenGVLab/InternViT-6B-224px",
    "internvit-6b-448px-v1.0": "OpenGVLab/InternViT-6B-448px-V1-0",
    "internvit-6b-448px-v1.2": "OpenGVLab/InternViT-6B-448px-V1-2",
    "internvit-6b-448px-v1.5": "OpenGVLab/InternViT-6B-448px-V1-5",
    "internvit-6b-448px-v2.5": "OpenGVLab/InternViT-6B-448px-V2_5",
    "internvit-300m-448px": "OpenGVLab/InternViT-300M-448px",
    "internvit-300m-448px-v2.5": "OpenGVLab/InternViT-300M-448px-V2_5",
}
