"""A recipe: everything a training run is made of but the data and the place, in one TOML file.

Each table of the file is a dataclass here; a key that it does not have, or a value of another type, is an error.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from internvit import InternViTBackbone, optim
from internvit.dense.segmentation import LinearHead, Segmenter, UPerNetHead
from internvit.dense.segmentation.augment import Augmentation
from internvit.dense.segmentation.evaluation import Testing

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib


@dataclass(frozen=True)
class Model:
    """The tower. precision "bfloat16": frozen, it is held so; trained, it runs under autocast on float32 weights."""

    weights: str = "OpenGVLab/InternViT-6B-224px"
    image_size: int = 504
    patch_size: int = 14
    out_indices: tuple[int, ...] = (44,)
    freeze: bool = True
    fpn: bool = False
    drop_path_rate: float = 0.0
    with_cp: bool = True
    precision: str = "bfloat16"


@dataclass(frozen=True)
class Head:
    """kind "linear", of which `dropout` alone is read, or "upernet"."""

    kind: str = "linear"
    dropout: float = 0.0
    channels: int = 1536
    auxiliary_index: int = 1
    auxiliary_weight: float = 0.4


@dataclass(frozen=True)
class Data:
    """batch images a step, micro_batch at once; of the training images only a fraction, drawn by the seed."""

    batch: int = 16
    micro_batch: int = 2
    fraction: float = 1.0
    reduce_zero_label: bool = True


@dataclass(frozen=True)
class Optimization:
    """AdamW; the rate rises linearly for warmup steps and falls as (1 - step / steps) ** power."""

    lr: float = 4e-5
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    steps: int = 80_000
    warmup: int = 1500
    warmup_ratio: float = 1e-6
    power: float = 1.0


@dataclass(frozen=True)
class Run:
    """Every how many steps what is done."""

    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000
    evaluate_every: int = 1000


@dataclass(frozen=True)
class Recipe:
    model: Model = field(default_factory=Model)
    head: Head = field(default_factory=Head)
    data: Data = field(default_factory=Data)
    augment: Augmentation = field(default_factory=Augmentation)
    optim: Optimization = field(default_factory=Optimization)
    test: Testing = field(default_factory=Testing)
    run: Run = field(default_factory=Run)

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, as the file has them."""
        return dataclasses.asdict(self)


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, with changes such as "optim.steps=100".

    Raises:
        ValueError: not TOML, or a table, key or value that a recipe does not have; the message names it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for change in changes:
            name, equals, value = change.partition("=")
            table, dot, key = name.strip().partition(".")
            if not (equals and dot):
                raise ValueError(f"--set: expected TABLE.KEY=VALUE, got {change!r}")
            tables.setdefault(table, {})[key] = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} and --set {' '.join(changes)}: not TOML: {error}") from error
    kinds = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}
    unknown = tables.keys() - kinds.keys()
    if unknown:
        raise ValueError(f"{path}: expected the tables {', '.join(kinds)}, got {', '.join(sorted(unknown))}")
    recipe = Recipe(**{name: _table(kinds[name], values, f"{path}: {name}") for name, values in tables.items()})
    if recipe.model.precision not in ("float32", "bfloat16"):
        raise ValueError(f"{path}: model.precision: expected float32 or bfloat16, got {recipe.model.precision!r}")
    if recipe.head.kind not in ("linear", "upernet"):
        raise ValueError(f"{path}: head.kind: expected linear or upernet, got {recipe.head.kind!r}")
    if recipe.data.batch % recipe.data.micro_batch:
        raise ValueError(f"{path}: data.batch={recipe.data.batch} is no multiple of micro_batch")
    return recipe


def _table(kind: Any, values: dict[str, Any], where: str) -> Any:
    defaults = dataclasses.asdict(kind())
    found = {}
    for key, value in values.items():
        if key not in defaults:
            raise ValueError(f"{where}: expected one of the keys {', '.join(defaults)}, got {key}")
        wanted = type(defaults[key])
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if wanted is float and type(value) is int else value
        if type(value) is not wanted:
            raise ValueError(f"{where}.{key}: expected {wanted.__name__}, got {value!r}")
        found[key] = value
    return kind(**found)


def build(recipe: Recipe, num_classes: int, device: str) -> Segmenter:
    """The network of a recipe, in training mode."""
    settings, head = recipe.model, recipe.head
    dtype = torch.bfloat16 if settings.freeze and settings.precision == "bfloat16" else torch.float32
    backbone = InternViTBackbone.from_pretrained(
        settings.weights,
        settings.out_indices,
        fpn=settings.fpn,
        freeze=settings.freeze,
        gradient_checkpointing="block" if settings.with_cp else "none",
        dtype=dtype,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
    )
    rates = backbone.config.replace(drop_path_rate=settings.drop_path_rate).drop_path_rates()
    for layer, rate in zip(backbone.encoder.layers, rates, strict=False):
        layer.drop_path_rate = rate
    for name, level in backbone.named_children():
        if name.startswith("up"):
            level.float()
    if head.kind == "linear":
        made = LinearHead(backbone.channels[-1], num_classes, head.dropout)
    else:
        made = UPerNetHead(
            backbone.channels,
            num_classes,
            head.channels,
            auxiliary_index=head.auxiliary_index,
            auxiliary_weight=head.auxiliary_weight,
            dropout=head.dropout,
        )
    return Segmenter(backbone, made).to(device).train()


def optimizer_and_schedule(recipe: Recipe, model: Segmenter) -> tuple[Any, Any]:
    """AdamW with layer-wise decay, and its schedule."""
    how = recipe.optim
    groups = optim.param_groups_layer_decay(model, how.weight_decay, how.layer_decay, how.lr)
    optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=how.betas)

    def factor(step: int) -> float:
        warmup = 1.0
        if step < how.warmup:
            warmup = 1 - (1 - step / how.warmup) * (1 - how.warmup_ratio)
        return warmup * max(1 - step / how.steps, 0.0) ** how.power

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
