"""What each upstream calls the parameters and the settings of an InternViT.

OpenGVLab's names are the canonical ones. In a template `#` is a layer's index, `*` is weight or bias, and `[qkv]`
stands for three names. mmseg (and OpenGVLab's classification and detection code) has timm's names; timm itself has no
q_norm and k_norm of the whole width.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

LAYOUTS = ("opengvlab", "transformers", "timm", "mmseg")
COLUMNS = ("opengvlab", "transformers", "timm")
PARAMETERS = (
    ("embeddings.class_embedding", "embeddings.cls_token", "cls_token"),
    ("embeddings.position_embedding", "embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embedding.*", "embeddings.patch_embeddings.projection.*", "patch_embed.proj.*"),
    ("encoder.layers.#.norm1.*", "encoder.layer.#.layernorm_before.*", "blocks.#.norm1.*"),
    ("encoder.layers.#.attn.qkv.*", "encoder.layer.#.attention.[qkv]_proj.*", "blocks.#.attn.qkv.*"),
    ("encoder.layers.#.attn.q_norm.weight", "encoder.layer.#.attention.q_norm.weight", "blocks.#.attn.q_norm.weight"),
    ("encoder.layers.#.attn.k_norm.weight", "encoder.layer.#.attention.k_norm.weight", "blocks.#.attn.k_norm.weight"),
    ("encoder.layers.#.attn.proj.*", "encoder.layer.#.attention.projection_layer.*", "blocks.#.attn.proj.*"),
    ("encoder.layers.#.norm2.*", "encoder.layer.#.layernorm_after.*", "blocks.#.norm2.*"),
    ("encoder.layers.#.mlp.fc1.*", "encoder.layer.#.mlp.fc1.*", "blocks.#.mlp.fc1.*"),
    ("encoder.layers.#.mlp.fc2.*", "encoder.layer.#.mlp.fc2.*", "blocks.#.mlp.fc2.*"),
    ("encoder.layers.#.ls1", "encoder.layer.#.lambda_1", "blocks.#.ls1.gamma"),
    ("encoder.layers.#.ls2", "encoder.layer.#.lambda_2", "blocks.#.ls2.gamma"),
)

# By these a tower is recognised: every InternViT has them, and few other networks have all of them.
TOWER_EMBEDDINGS = (
    "embeddings.class_embedding",
    "embeddings.position_embedding",
    "embeddings.patch_embedding.weight",
)
TOWER_BLOCK = (
    "encoder.layers.#.norm1.weight",
    "encoder.layers.#.attn.qkv.weight",
    "encoder.layers.#.attn.proj.weight",
    "encoder.layers.#.norm2.weight",
    "encoder.layers.#.mlp.fc1.weight",
    "encoder.layers.#.mlp.fc2.weight",
    "encoder.layers.#.ls1",
    "encoder.layers.#.ls2",
)

# Parts that wrappers put into names: torch.compile, checkpoint_wrapper, FSDP, DistributedDataParallel.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"})
# Spellings of a known name: PEFT's wrapped Linears, SGLang's attention.
_RESPELL = ((".base_layer.", "."), (".attn.attn.", ".attn."), (".attn.qkv_proj.", ".attn.qkv."))

# What is stored beside the tower under the same prefix and is not part of it: OpenGVLab's CLIP projector, heads,
# transformers' and DINOv2's mask token, the backbone's feature pyramid, the heads of mmseg and mmdet.
EXTRAS = re.compile(
    r"(clip_projector|head|fc_norm|attn_pool|up[1-4]|decode_head|auxiliary_head|rpn_head|roi_head|neck)\..*"
    r"|(embeddings\.)?mask_token"
)
ADAPTERS = re.compile(r"\.(lora_[A-Za-z_]+|hada_\w+|lokr_\w+|oft_\w+|ia3_l)(\.|$)")
# Of quantised checkpoints: without them the weights mean nothing.
SCALES = re.compile(r".*[._](scale|scale_inv|scales|qzeros|zero_point|absmax|quant_state\b.*|quant_map)")
STATE_DICT_WRAPPERS = ("state_dict", "module", "model")

TRANSFORMERS_FIELDS = {
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "layer_scale_init_value": "initializer_factor",
}
CONFIG_FIELDS = {
    **TRANSFORMERS_FIELDS,
    # the mmseg/mmdet backbones and timm's VisionTransformer
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "in_chans": "num_channels",
    "img_size": "image_size",
    "init_values": "initializer_factor",
    "eps": "layer_norm_eps",
}
CONFIG_DEFAULTS: dict[str, dict[str, Any]] = {
    "opengvlab": {},
    "transformers": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "norm_type": "layer_norm",
        "image_size": 448,
        "qkv_bias": False,
        "qk_normalization": False,
        "qk_norm_eps": 1e-6,
        "pos_embed_mode": "param_dtype",
    },
    "mmseg": {"pos_embed_mode": "static"},
    "timm": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "patch_size": 16,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "pos_embed_mode": "antialias",
    },
}
TRANSFORMERS_MODEL_TYPES = ("internvl_vision", "qianfan_ocr_vision", "interns1_vision")
MODEL_TYPE_DEFAULTS: dict[str, dict[str, Any]] = {"qianfan_ocr_vision": {"qkv_bias": True, "drop_path_rate": 0.1}}
"""Where a family's defaults are not those of transformers' InternVL."""
TIMM_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit_intern300m_patch14_448": {
        "img_size": 448,
        "patch_size": 14,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "init_values": 0.1,
    },
}


class Name(NamedTuple):
    """One name of the table."""

    layout: str  # one of COLUMNS
    canonical: str  # OpenGVLab's template, with its leaf
    part: int | None  # 0, 1, 2: q, k or v alone


class Match(NamedTuple):
    """What a key of a state dict means."""

    prefix: str
    name: Name
    layer: str  # empty outside of layers


def _expand(template: str) -> list[tuple[str, ...]]:
    """For each parameter of a template its name, or three names where q, k and v are apart."""
    leaves = [template.replace("*", leaf) for leaf in ("weight", "bias")] if "*" in template else [template]
    return [tuple(leaf.replace("[qkv]", part) for part in "qkv") if "[qkv]" in leaf else (leaf,) for leaf in leaves]


_SPELLED: dict[tuple[str, str], tuple[str, ...]] = {
    (layout, canonical): names
    for row in PARAMETERS
    for layout, template in zip(COLUMNS, row, strict=True)
    for (canonical,), names in zip(_expand(row[0]), _expand(template), strict=True)
}


def _known_names() -> dict[str, Name]:
    names = {
        name: Name(layout, canonical, part if len(spelled) == 3 else None)
        for (layout, canonical), spelled in _SPELLED.items()
        for part, name in enumerate(spelled)
    }
    for name, meaning in list(names.items()):
        if meaning.layout == "opengvlab":  # ViTP saves without `encoder.`
            names[name.removeprefix("encoder.")] = meaning
        if meaning.layout == "transformers" and name.endswith("_norm.weight"):
            names[name.replace(".attention.", ".attn.")] = meaning  # misplaced by OpenGVLab's internvl_custom2hf.py
    return names


_NAMES = _known_names()


def names_of(layout: str, canonical: str, layer: str) -> list[str]:
    """What a layout calls a parameter: one name, or those of q, k and v."""
    column = "timm" if layout == "mmseg" else layout
    return [name.replace("#", layer) for name in _SPELLED[column, canonical]]


def clean(key: str) -> str:
    """A key without the parts that wrappers have put into it, in the spelling of the table."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPER_PARTS)
    for theirs, ours in _RESPELL:
        key = key.replace(theirs, ours)
    return key


def match(key: str) -> Match | None:
    """What a key means, whatever its prefix; None for no name of the table."""
    parts = key.split(".")
    for start, first in enumerate(parts):
        if first in _WRAPPER_PARTS:
            continue  # it belongs to the prefix
        rest = clean(".".join(parts[start:])).split(".")
        name = _NAMES.get(".".join("#" if part.isdecimal() else part for part in rest))
        if name is not None:
            layer = next((part for part in rest if part.isdecimal()), "")
            return Match("".join(f"{part}." for part in parts[:start]), name, layer)
    return None


def listed(names: Iterable[str]) -> str:
    """The first ten names and how many there are."""
    names = list(names)
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")
