"""State dicts of InternViT under the names of OpenGVLab, transformers, timm and mmseg, and the way between them.

OpenGVLab's names are the canonical ones. The layouts differ in names, and in that transformers keeps q, k and v as
three Linears while the others pack them into one of 3C rows, [q | k | v], each head-major. So a conversion is a plan,
made from the keys alone: for each target key, the source keys and which third of their rows. `convert_state_dict`
carries it out on tensors; `internvit.checkpoint.load` streams it from files.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvit.config import InternViTConfig

logger = logging.getLogger(__name__)

LAYOUTS = ("opengvlab", "transformers", "timm", "mmseg")

# `#` is a layer's index, `*` is weight or bias, `[qkv]` three names. mmseg (and OpenGVLab's classification and
# detection code) has timm's names; timm itself has no q_norm and k_norm of the whole width.
_COLUMNS = ("opengvlab", "transformers", "timm")
_TABLE = (
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

# Spellings of a known name: PEFT's wrapped Linears, SGLang's attention.
_RESPELL = ((".base_layer.", "."), (".attn.attn.", ".attn."), (".attn.qkv_proj.", ".attn.qkv."))

# What is stored beside the tower under the same prefix and is not part of it: OpenGVLab's CLIP projector, heads,
# transformers' and DINOv2's mask token, the backbone's feature pyramid, the heads of mmseg and mmdet.
_EXTRAS = re.compile(
    r"(clip_projector|head|fc_norm|attn_pool|up[1-4]|decode_head|auxiliary_head|rpn_head|roi_head|neck)\..*"
    r"|(embeddings\.)?mask_token"
)
_LORA = re.compile(r"\.(lora_[A-Za-z_]+|hada_\w+|lokr_\w+|oft_\w+|ia3_l)(\.|$)")
_WRAPPERS = ("state_dict", "module", "model")


class _Name(NamedTuple):
    layout: str  # a column of the table
    canonical: str  # OpenGVLab's template
    part: int | None  # 0, 1, 2: q, k or v alone


class Piece(NamedTuple):
    """One source of a target tensor: all rows of `key`, or one of the thirds q, k, v of its rows."""

    key: str
    part: int | None

    def of(self, tensor: Tensor) -> Tensor:
        """The rows of a source tensor that are meant."""
        return tensor if self.part is None else tensor.chunk(3)[self.part]


@dataclass(frozen=True)
class ConversionPlan:
    """How to make one layout from another; the pieces of a target are concatenated along their first dimension.

    Attributes:
        layout: of the source, one of `LAYOUTS`.
        prefix: what stood before the names of the source, with its final dot.
        targets: for each target key, its pieces.
        set_aside: source keys known not to belong to the tower.
        unexpected: source keys that nothing here knows.
    """

    layout: str
    prefix: str
    targets: dict[str, tuple[Piece, ...]]
    set_aside: tuple[str, ...]
    unexpected: tuple[str, ...]

    def sources(self) -> list[str]:
        """The source keys that are needed."""
        return list(dict.fromkeys(piece.key for pieces in self.targets.values() for piece in pieces))

    def log_set_aside(self, source: str) -> None:
        if self.set_aside:
            logger.info("%s: set aside, as no part of the InternViT: %s", source, _listed(self.set_aside))


def _expand(template: str) -> list[tuple[str, ...]]:
    """For each parameter of a template its name, or three names where q, k and v are apart."""
    leaves = [template.replace("*", leaf) for leaf in ("weight", "bias")] if "*" in template else [template]
    return [tuple(leaf.replace("[qkv]", part) for part in "qkv") if "[qkv]" in leaf else (leaf,) for leaf in leaves]


_SPELLED: dict[tuple[str, str], tuple[str, ...]] = {
    (layout, canonical): names
    for row in _TABLE
    for layout, template in zip(_COLUMNS, row, strict=True)
    for (canonical,), names in zip(_expand(row[0]), _expand(template), strict=True)
}


def _known_names() -> dict[str, _Name]:
    names = {
        name: _Name(layout, canonical, part if len(spelled) == 3 else None)
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


class _Match(NamedTuple):
    prefix: str
    name: _Name
    layer: str


def _match(key: str) -> _Match | None:
    parts = _respell(key).split(".")
    generic = ["#" if part.isdigit() else part for part in parts]
    for start in range(len(parts)):
        name = _NAMES.get(".".join(generic[start:]))
        if name is not None:
            layer = next((part for part in parts[start:] if part.isdigit()), "")
            return _Match("".join(f"{part}." for part in parts[:start]), name, layer)
    return None


def _respell(key: str) -> str:
    for theirs, ours in _RESPELL:
        key = key.replace(theirs, ours)
    return key


def _listed(names: Iterable[str]) -> str:
    """The first ten names and how many there are."""
    names = list(names)
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "")


def _tower(keys: Iterable[str]) -> tuple[dict[str, _Match | None], str, str]:
    """What each key means, and the (column, prefix) that most of them agree on."""
    matches = {key: _match(key) for key in keys}
    votes = Counter((match.name.layout, match.prefix) for match in matches.values() if match)
    if not votes:
        lora = [key for key in matches if _LORA.search(key)]
        if lora:
            raise ValueError(_lora_message(lora))
        raise ValueError(
            f"state dict: expected the keys of an InternViT as OpenGVLab, transformers, timm or mmseg name them, "
            f"got {_listed(matches) or 'no keys'}"
        )
    class_tokens = [key for key, match in matches.items() if match and match.name.canonical == _TABLE[0][0]]
    if len(class_tokens) > 1:
        raise ValueError(f"state dict: expected one InternViT, got {len(class_tokens)}: {_listed(class_tokens)}")
    (column, prefix), _ = votes.most_common(1)[0]
    return matches, column, prefix


def _lora_message(keys: Sequence[str]) -> str:
    return (
        f"state dict: expected plain weights, got those of an adapter beside them: {_listed(keys)}; "
        f"merge it first (PEFT: model.merge_and_unload())"
    )


def detect_layout(keys: Iterable[str]) -> tuple[str, str]:
    """The layout of a state dict's keys, one of `LAYOUTS`, and the prefix before the tower's names.

    timm and mmseg share their names: those with q_norm or with a backbone's company are called mmseg.

    Raises:
        ValueError: no InternViT, or more than one, or only an adapter's weights.
    """
    matches, column, prefix = _tower(keys)
    if column == "timm":
        company = re.compile(re.escape(prefix) + r"up[1-4]\.|(decode|auxiliary|roi|rpn)_head\.|neck\.")
        qk_norm = any(match and match.name.canonical.endswith("q_norm.weight") for match in matches.values())
        if qk_norm or prefix.endswith("backbone.") or any(company.match(key) for key in matches):
            column = "mmseg"
    return column, prefix


def conversion_plan(keys: Iterable[str], to: str = "opengvlab") -> ConversionPlan:
    """How to make the layout `to` from a state dict with these keys, in whatever layout they are.

    Raises:
        ValueError: no InternViT or more than one, adapter weights, two keys for one parameter, one of q, k and v
            missing, or QK-norm asked of timm.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to: expected one of {', '.join(LAYOUTS)}, got {to!r}")
    keys = list(keys)
    matches, column, prefix = _tower(keys)
    sources: dict[tuple[str, str], dict[int | None, str]] = {}  # (canonical, layer) -> part -> key
    set_aside: list[str] = []
    unexpected: list[str] = []
    lora: list[str] = []
    for key, match in matches.items():
        if match and match.prefix == prefix and match.name.layout == column:
            parts = sources.setdefault((match.name.canonical, match.layer), {})
            if match.name.part in parts:
                raise ValueError(f"state dict: expected one key a parameter, got {parts[match.name.part]} and {key}")
            parts[match.name.part] = key
            continue
        spelled = _respell(key)
        name = spelled.removeprefix(prefix)
        # A batch norm before the classifier; a final norm over the tokens would change the features.
        head_norm = name.startswith("norm.") and f"{prefix}norm.running_mean" in matches
        if not spelled.startswith(prefix) or head_norm or _EXTRAS.fullmatch(name):
            set_aside.append(key)
        else:
            (lora if _LORA.search(key) else unexpected).append(key)
    if lora:
        raise ValueError(_lora_message(lora))

    targets: dict[str, tuple[Piece, ...]] = {}
    for (canonical, layer), parts in sources.items():
        if to == "timm" and canonical.endswith(("q_norm.weight", "k_norm.weight")):
            raise ValueError(
                "to: expected a layout with QK-norm over the whole width, got 'timm', whose qk_norm is per head: "
                "an InternViT with QK-norm (6B) has no form there; 'mmseg' has timm's names and QK-norm"
            )
        split = None not in parts
        if split and len(parts) < 3:
            raise ValueError(f"state dict: expected q, k and v, got only {_listed(parts.values())}")
        whole = [Piece(parts[part], None) for part in ((0, 1, 2) if split else (None,))]
        names = [name.replace("#", layer) for name in _SPELLED["timm" if to == "mmseg" else to, canonical]]
        if len(names) == len(whole):
            targets.update({name: (piece,) for name, piece in zip(names, whole, strict=True)})
        elif split:
            targets[names[0]] = tuple(whole)
        else:
            targets.update({name: (Piece(parts[None], part),) for part, name in enumerate(names)})
    layout = detect_layout(keys)[0]
    return ConversionPlan(layout, prefix, targets, tuple(set_aside), tuple(unexpected))


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict that may be wrapped as {"state_dict" | "module" | "model": ...}.

    Raises:
        ValueError: something else than tensors under string names.
    """
    inner: Mapping[str, Any] = state_dict
    while isinstance(inner, Mapping):
        wrapped = [inner[name] for name in _WRAPPERS if isinstance(inner.get(name), Mapping)]
        if not wrapped:
            break
        inner = wrapped[0]
    if not isinstance(inner, Mapping):
        raise ValueError(f"state dict: expected a dict of tensors, got {type(inner).__name__}")
    other = [str(key) for key, value in inner.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise ValueError(f"state dict: expected a tensor under every name, got something else under {_listed(other)}")
    return dict(inner)


def convert_state_dict(
    state_dict: Mapping[str, Any], to: str = "opengvlab", *, config: InternViTConfig | None = None
) -> dict[str, Tensor]:
    """The same weights under another layout's names, from any layout and prefix; bit for bit, and no key is lost.

    Args:
        state_dict: of an InternViT or of a model around it; what is known not to belong to the tower (another part of
            the model, heads, a mask token) is set aside and logged.
        to: "opengvlab", "transformers", "timm" or "mmseg".
        config: if given, the result must be exactly the parameters of such a model.

    Returns:
        Tensors that share memory with the given ones, except where q, k and v had to be packed.

    Raises:
        ValueError: unknown keys, missing ones as far as can be told, adapter weights that are not merged, an InternViT
            with QK-norm asked of timm, or, with a config, missing or wrong-shaped parameters.
    """
    tensors = unwrap(state_dict)
    plan = conversion_plan(tensors, to)
    target_shapes(plan, tensors)  # thirds that are no thirds
    shapes = target_shapes(conversion_plan(tensors), tensors)
    _refuse_per_head_qk_norm(shapes)
    if config is not None:
        compare_shapes(shapes, config.parameter_shapes(), plan.unexpected, source="state dict")
    elif plan.unexpected:
        raise ValueError(f"state dict: unexpected keys: {_listed(plan.unexpected)}")
    plan.log_set_aside("state dict")
    converted = {}
    for name, pieces in plan.targets.items():
        parts = [piece.of(tensors[piece.key]) for piece in pieces]
        if len({part.dtype for part in parts}) > 1:
            raise ValueError(f"state dict: expected q, k and v of one dtype, got {[p.dtype for p in parts]} for {name}")
        converted[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return converted


def target_shapes(plan: ConversionPlan, sources: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that a plan's targets will have; `sources` maps its keys to tensors or shapes."""
    shapes = {}
    for name, pieces in plan.targets.items():
        parts = [tuple(getattr(sources[piece.key], "shape", sources[piece.key])) for piece in pieces]
        first, *others = parts
        if pieces[0].part is not None:
            if not first or first[0] % 3:
                raise ValueError(f"state dict: expected q, k and v of one size in {pieces[0].key}, got {first}")
            first = (first[0] // 3, *first[1:])
        elif others:
            if not first or any(other != first for other in others):
                raise ValueError(f"state dict: expected q, k and v of one shape, got {parts} for {name}")
            first = (3 * first[0], *first[1:])
        shapes[name] = first
    return shapes


def compare_shapes(
    found: Mapping[str, Sequence[int]],
    expected: Mapping[str, Sequence[int]],
    unexpected: Iterable[str],
    *,
    source: str,
    strict: bool = True,
) -> None:
    """Compares parameters by name and shape; `unexpected` are keys that have no name among them at all.

    Raises:
        ValueError: one error that lists what is missing, unexpected and wrong-shaped; unless `strict`, the first two
            are logged instead.
    """
    missing = [name for name in expected if name not in found]
    extra = [*unexpected, *(name for name in found if name not in expected)]
    shared = [name for name in expected if name in found and tuple(found[name]) != tuple(expected[name])]
    wrong = [f"{name} (expected {tuple(expected[name])}, got {tuple(found[name])})" for name in shared]
    problems = [(kind, names) for kind, names in (("missing", missing), ("unexpected", extra)) if names]
    if problems and not strict:
        logger.warning("%s: %s", source, "; ".join(f"{kind} keys: {_listed(names)}" for kind, names in problems))
        problems = []
    message = [f"{kind} keys: {_listed(names)}" for kind, names in problems]
    if wrong:
        message.append(f"wrong shapes: {_listed(wrong)}")
    if "embeddings.position_embedding" in shared:
        message.append(
            "a position embedding of another grid loads with a config of the image_size it was made for; "
            "resize_pos_embeddings changes the grid after that"
        )
    if message:
        raise ValueError(f"{source}: the weights do not fit the configuration: " + "; ".join(message))


def _refuse_per_head_qk_norm(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        width = shapes.get(name.replace("attn.q_norm", "norm1"), shape)
        if name.endswith("q_norm.weight") and shape != width:
            raise ValueError(f"state dict: expected {name} over the whole width {width}, got {shape}: QK-norm per head")


def infer_config(state_dict: Mapping[str, Any]) -> InternViTConfig:
    """The configuration of a state dict in any layout, from its names and shapes.

    The number of heads cannot be seen in them. It is taken from the published models: head_dim is 128 with QK-norm
    (6B) and 64 without (300M). The grid is taken to be square; eps, drop path, initial values and the resizing of the
    position embedding are the defaults of `InternViTConfig`.

    Args:
        state_dict: tensors, or shapes, under names of any layout.

    Raises:
        ValueError: a width that is no multiple of that head_dim, a grid that is not square, or layers or parameters
            missing: pass a config.
    """
    if not all(isinstance(value, tuple) for value in state_dict.values()):
        state_dict = unwrap(state_dict)
    plan = conversion_plan(state_dict)
    shapes = target_shapes(plan, state_dict)
    _refuse_per_head_qk_norm(shapes)
    first = "encoder.layers.0."
    needed = (*(row[0].replace("*", "weight") for row in _TABLE[:3]), f"{first}mlp.fc1.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"state dict: expected the parameters of an InternViT, {_listed(missing)} missing")
    width, channels, patch, _ = shapes["embeddings.patch_embedding.weight"]
    qk_norm = f"{first}attn.q_norm.weight" in shapes
    head_dim = 128 if qk_norm else 64
    side = math.isqrt(shapes["embeddings.position_embedding"][1] - 1)
    if width % head_dim or side**2 + 1 != shapes["embeddings.position_embedding"][1]:
        raise ValueError(
            f"state dict: expected a width that is a multiple of head_dim={head_dim} and a square grid, got width "
            f"{width} and {shapes['embeddings.position_embedding'][1] - 1} patches; pass config"
        )
    return InternViTConfig(
        num_channels=channels,
        patch_size=patch,
        image_size=side * patch,
        hidden_size=width,
        num_hidden_layers=len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")}),
        num_attention_heads=width // head_dim,
        intermediate_size=shapes[f"{first}mlp.fc1.weight"][0],
        norm_type="layer_norm" if f"{first}norm1.bias" in shapes else "rms_norm",
        qkv_bias=f"{first}attn.qkv.bias" in shapes,
        qk_normalization=qk_norm,
    )
