"""State dicts of InternViT under the names of OpenGVLab, transformers, timm and mmseg, and conversions between them.

OpenGVLab's names are the canonical ones. The layouts differ in names, and in that transformers keeps q, k and v as
three Linears while the others pack them into one of 3C rows, [q | k | v], each head-major. So a conversion is a plan,
made from the keys alone: for each target key, the source keys and which third of their rows. `convert_state_dict`
carries it out on tensors; `internvit.checkpoint.load` streams it from files.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvit.checkpoint.tower import adapter_message, find_tower
from internvit.config import InternViTConfig
from internvit.names import ADAPTERS, LAYOUTS, STATE_DICT_WRAPPERS, TOWER_EMBEDDINGS, listed, names_of

logger = logging.getLogger(__name__)

_MAX_WRAPPERS = 8
_MAX_MISSING_BLOCKS = 100
_PARTITIONED = (
    "an empty parameter is one that DeepSpeed's ZeRO-3 has partitioned: gather them first (zero_to_fp32.py, or "
    "stage3_gather_16bit_weights_on_model_save)"
)


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
            logger.info("%s: set aside, as no part of the InternViT: %s", source, listed(self.set_aside))


def detect_layout(keys: Iterable[str], prefix: str | None = None) -> tuple[str, str]:
    """The layout of a state dict's keys, one of `LAYOUTS`, and the prefix before the tower's names.

    timm and mmseg share their names: those with q_norm or beside a backbone's other parts are called mmseg.

    Args:
        keys: of the state dict.
        prefix: which tower is meant, where there are several.

    Raises:
        ValueError: no InternViT, or more than one and no prefix, or only an adapter's weights.
    """
    tower = find_tower(keys, prefix)
    return tower.layout, tower.prefix


def conversion_plan(keys: Iterable[str], to: str = "opengvlab", prefix: str | None = None) -> ConversionPlan:
    """How to make the layout `to` from a state dict with these keys, in whatever layout they are.

    Args:
        keys: of the state dict.
        to: one of `LAYOUTS`.
        prefix: which tower is meant, where there are several.

    Raises:
        ValueError: no InternViT, or more than one and no prefix, adapter weights, two keys for one parameter, one of
            q, k and v missing, or QK-norm asked of timm.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to: expected one of {', '.join(LAYOUTS)}, got {to!r}")
    tower = find_tower(keys, prefix)
    sources: dict[tuple[str, str], dict[int | None, str]] = {}  # (canonical, layer) -> part -> key
    for key, match in tower.parameters.items():
        parts = sources.setdefault((match.name.canonical, match.layer), {})
        if match.name.part in parts:
            raise ValueError(f"state dict: expected one key a parameter, got {parts[match.name.part]} and {key}")
        parts[match.name.part] = key
    adapters = [key for key in tower.unexpected if ADAPTERS.search(key)]
    if adapters:
        raise ValueError(adapter_message(adapters))
    targets: dict[str, tuple[Piece, ...]] = {}
    for (canonical, layer), parts in sources.items():
        targets |= _pieces(canonical, layer, parts, to)
    return ConversionPlan(tower.layout, tower.prefix, targets, tower.set_aside, tower.unexpected)


def _pieces(canonical: str, layer: str, parts: Mapping[int | None, str], to: str) -> dict[str, tuple[Piece, ...]]:
    """The targets made from the keys of one parameter: `parts` has one under None, or q, k and v under 0, 1, 2."""
    if to == "timm" and canonical.endswith(("q_norm.weight", "k_norm.weight")):
        raise ValueError(
            "to: expected a layout with QK-norm over the whole width, got 'timm', whose qk_norm is per head: "
            "an InternViT with QK-norm (6B) has no form there; 'mmseg' has timm's names and QK-norm"
        )
    split = None not in parts
    if split and len(parts) < 3:
        raise ValueError(f"state dict: expected q, k and v, got only {listed(parts.values())}")
    whole = [Piece(parts[part], None) for part in ((0, 1, 2) if split else (None,))]
    names = names_of(to, canonical, layer)
    if len(names) == len(whole):
        return {name: (piece,) for name, piece in zip(names, whole, strict=True)}
    if split:
        return {names[0]: tuple(whole)}
    return {name: (Piece(parts[None], part),) for part, name in enumerate(names)}


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict that may be wrapped as {"state_dict" | "module" | "model": ...}.

    Raises:
        ValueError: something else than tensors under string names.
    """
    inner: Mapping[str, Any] = state_dict
    for _ in range(_MAX_WRAPPERS):
        wrapped = [inner[name] for name in STATE_DICT_WRAPPERS if isinstance(inner, Mapping)
                   and isinstance(inner.get(name), Mapping)]  # fmt: skip
        if not wrapped:
            break
        inner = wrapped[0]
    else:
        raise ValueError(f"state dict: expected at most {_MAX_WRAPPERS} dicts around the tensors, got more, or a cycle")
    if not isinstance(inner, Mapping):
        raise ValueError(f"state dict: expected a dict of tensors, got {type(inner).__name__}")
    other = [str(key) for key, value in inner.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if other:
        raise ValueError(f"state dict: expected a tensor under every name, got something else under {listed(other)}")
    return dict(inner)


def convert_state_dict(
    state_dict: Mapping[str, Any],
    to: str = "opengvlab",
    *,
    config: InternViTConfig | None = None,
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """The same weights under another layout's names, from any layout and prefix; bit for bit, and no key is lost.

    Args:
        state_dict: of an InternViT or of a model around it; what is known not to belong to the tower (another part of
            the model, heads, a mask token) is set aside and logged.
        to: "opengvlab", "transformers", "timm" or "mmseg".
        config: if given, the result must be exactly the parameters of such a model.
        prefix: which InternViT is meant, where there are several.

    Returns:
        Tensors that share memory with the given ones, except where q, k and v had to be packed.

    Raises:
        ValueError: unknown keys, missing ones as far as can be told, adapter weights that are not merged, an InternViT
            with QK-norm asked of timm, or, with a config, missing or wrong-shaped parameters.
    """
    tensors = unwrap(state_dict)
    plan = conversion_plan(tensors, to, prefix)
    target_shapes(plan, tensors)  # thirds that are no thirds
    shapes = target_shapes(conversion_plan(tensors, prefix=prefix), tensors)
    _refuse_per_head_qk_norm(shapes)
    if config is not None:
        compare_shapes(shapes, config, plan.unexpected, source="state dict")
    elif plan.unexpected:
        raise ValueError(f"state dict: unexpected keys: {listed(plan.unexpected)}")
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
    shapes: Mapping[str, Sequence[int]],
    config: InternViTConfig,
    unexpected: Iterable[str],
    *,
    source: str,
    strict: bool = True,
) -> None:
    """Compares parameters with those of a configuration, by name and shape.

    Args:
        shapes: under OpenGVLab's names.
        config: whose `parameter_shapes` are expected.
        unexpected: keys that have no name among them at all.
        source: of the weights, for messages.
        strict: missing and unexpected keys are an error; otherwise they are logged.

    Raises:
        ValueError: one error that lists what is missing, unexpected and wrong-shaped.
    """
    depth = len({name.split(".")[2] for name in shapes if name.startswith("encoder.layers.")})
    if config.num_hidden_layers > depth + _MAX_MISSING_BLOCKS:  # whose parameters would fill the memory to list
        raise ValueError(
            f"{source}: the weights do not fit the configuration: expected num_hidden_layers="
            f"{config.num_hidden_layers} blocks, got {depth}"
        )
    expected = config.parameter_shapes()
    missing = [name for name in expected if name not in shapes]
    extra = [*unexpected, *(name for name in shapes if name not in expected)]
    shared = [name for name in expected if name in shapes and tuple(shapes[name]) != tuple(expected[name])]
    wrong = [f"{name} (expected {tuple(expected[name])}, got {tuple(shapes[name])})" for name in shared]
    problems = [(kind, names) for kind, names in (("missing", missing), ("unexpected", extra)) if names]
    if problems and not strict:
        logger.warning("%s: %s", source, "; ".join(f"{kind} keys: {listed(names)}" for kind, names in problems))
        problems = []
    message = [f"{kind} keys: {listed(names)}" for kind, names in problems]
    if wrong:
        message.append(f"wrong shapes: {listed(wrong)}")
    if any(tuple(shapes[name]) == (0,) for name in shared):
        message.append(_PARTITIONED)
    elif "embeddings.position_embedding" in shared:
        message.append(
            "a position embedding of another grid loads with a config of the image_size it was made for; "
            "resize_pos_embeddings changes the grid after that"
        )
    if message:
        raise ValueError(f"{source}: the weights do not fit the configuration: " + "; ".join(message))


_INSTEAD = {
    5: "the patch embedding of a video model [C, channels, frames, p, p]",
    2: "a patch embedding by a Linear [C, channels * p * p]: reshape it to [C, channels, p, p] if its pixels are in "
    "that order",
}


def _require_rank(name: str, shape: Sequence[int], rank: int) -> None:
    if len(shape) == rank:
        return
    what = ""
    if tuple(shape) == (0,):
        what = "; " + _PARTITIONED
    elif name == "embeddings.patch_embedding.weight" and len(shape) in _INSTEAD:
        what = "; it may be " + _INSTEAD[len(shape)]
    raise ValueError(f"state dict: expected {name} with {rank} dimensions, got {tuple(shape)}{what}")


def _refuse_per_head_qk_norm(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        width = shapes.get(name.replace("attn.q_norm", "norm1"), shape)
        if name.endswith("q_norm.weight") and shape != width:
            raise ValueError(f"state dict: expected {name} over the whole width {width}, got {shape}: QK-norm per head")


def infer_config(state_dict: Mapping[str, Any], prefix: str | None = None) -> InternViTConfig:
    """The configuration of a state dict in any layout, from its names and shapes.

    The number of heads cannot be seen in them. It is taken from the published models: head_dim is 128 with QK-norm
    (6B) and 64 without (300M). The grid is taken to be square; eps, drop path, initial values and the resizing of the
    position embedding are the defaults of `InternViTConfig`.

    Args:
        state_dict: tensors, or shapes, under names of any layout.
        prefix: which InternViT is meant, where there are several.

    Raises:
        ValueError: a width that is no multiple of that head_dim, a grid that is not square, or layers or parameters
            missing: pass a config. Embeddings of other ranks (video, patches by a Linear), parameters partitioned by
            ZeRO-3.
    """
    if not all(isinstance(value, tuple) for value in state_dict.values()):
        state_dict = unwrap(state_dict)
    plan = conversion_plan(state_dict, prefix=prefix)
    shapes = target_shapes(plan, state_dict)
    _refuse_per_head_qk_norm(shapes)
    first = "encoder.layers.0."
    needed = (*TOWER_EMBEDDINGS, f"{first}mlp.fc1.weight")
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise ValueError(f"state dict: expected the parameters of an InternViT, {listed(missing)} missing")
    for name, rank in zip(needed, (3, 3, 4, 2), strict=True):
        _require_rank(name, shapes[name], rank)
    width, channels, patch, patch_width = shapes["embeddings.patch_embedding.weight"]
    if patch != patch_width:
        raise ValueError(f"state dict: expected square patches, got {patch}x{patch_width}")
    qk_norm = f"{first}attn.q_norm.weight" in shapes
    head_dim = 128 if qk_norm else 64
    patches = shapes["embeddings.position_embedding"][1] - 1
    side = math.isqrt(max(patches, 0))
    if not width or width % head_dim or side**2 != patches:
        raise ValueError(
            f"state dict: expected a width that is a multiple of head_dim={head_dim} and a square grid, got width "
            f"{width} and {patches} patches; pass config"
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
