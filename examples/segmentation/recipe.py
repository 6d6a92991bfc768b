"""A training recipe: all settings of a run but its data and its folder, in one TOML file.

Each table of the file is a dataclass here. An unknown key, a value of another type and a value that no training can
have are errors, before anything is loaded.
"""

import dataclasses
import math
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
    """The tower. With precision "bfloat16" a frozen tower has bfloat16 weights, a trained one float32 and autocast."""

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
    """The seed, and the number of steps between two log rows, checkpoints and evaluations."""

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


_POSITIVE = {
    "model": ("image_size", "patch_size"),
    "head": ("channels",),
    "data": ("batch", "micro_batch"),
    "augment": ("crop", "short_side", "long_side"),
    "optim": ("steps",),
    "test": ("crop", "stride", "long_side", "batch"),
    "run": ("log_every", "checkpoint_every", "evaluate_every"),
}
_RANGES = (
    ("model.drop_path_rate", 0, 1),
    ("head.dropout", 0, 1),
    ("head.auxiliary_weight", 0, 1e6),
    ("data.fraction", 0, 1),
    ("augment.max_class_ratio", 0, 1),
    ("augment.flip", 0, 1),
    ("optim.weight_decay", 0, 1e6),
    ("optim.layer_decay", 0, 1),
    ("optim.warmup", 0, 1e12),
    ("optim.warmup_ratio", 0, 1),
    ("optim.power", 0, 1e6),
)


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe:
    """The recipe of a TOML file, with changes such as "optim.steps=100".

    Raises:
        ValueError: not TOML, an unknown table or key, or a value that no training can have; the message names it.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for change in changes:
            name, equals, value = change.partition("=")
            table, dot, key = name.strip().partition(".")
            if not (equals and dot):
                raise ValueError(f"--set: expected TABLE.KEY=VALUE, got {change!r}")
            if isinstance(tables.setdefault(table, {}), dict):
                tables[table][key] = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} and --set {' '.join(changes)}: not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    kinds = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}
    unknown = tables.keys() - kinds.keys()
    if unknown:
        raise ValueError(f"{path}: expected the tables {', '.join(kinds)}, got {', '.join(sorted(unknown))}")
    recipe = Recipe(**{name: _table(kinds[name], values, f"{path}: {name}") for name, values in tables.items()})
    try:
        _check(recipe)
    except (ValueError, TypeError) as error:  # a TypeError compares what should be numbers
        raise ValueError(f"{path}: {error}") from error
    return recipe


def _table(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a table, got {values!r}")
    defaults = dataclasses.asdict(kind())
    fields = {}
    for key, value in values.items():
        if key not in defaults:
            raise ValueError(f"{where}: expected one of the keys {', '.join(defaults)}, got {key}")
        wanted = type(defaults[key])
        value = tuple(value) if isinstance(value, list) else value
        value = float(value) if wanted is float and type(value) is int else value
        if type(value) is not wanted:
            raise ValueError(f"{where}.{key}: expected {wanted.__name__}, got {value!r}")
        fields[key] = value
    return kind(**fields)


def _check(recipe: Recipe) -> None:
    """Raises ValueError for the first value that no training can have, by its name in the file."""
    model, head, data, augment, optimization = recipe.model, recipe.head, recipe.data, recipe.augment, recipe.optim
    test, run = recipe.test, recipe.run
    for table, keys in _POSITIVE.items():
        for key in keys:
            _expect(getattr(getattr(recipe, table), key) >= 1, recipe, f"{table}.{key}", "at least 1")
    for name, low, high in _RANGES:
        table, key = name.split(".")
        value = getattr(getattr(recipe, table), key)
        _expect(low <= value <= high, recipe, name, f"a number from {low:g} to {high:g}")
    _expect(math.isfinite(optimization.lr) and optimization.lr > 0, recipe, "optim.lr", "a number over 0")
    _expect(data.fraction > 0, recipe, "data.fraction", "a number over 0")
    _expect(optimization.layer_decay > 0, recipe, "optim.layer_decay", "a number over 0")
    _expect(model.precision in ("float32", "bfloat16"), recipe, "model.precision", "float32 or bfloat16")
    _expect(head.kind in ("linear", "upernet"), recipe, "head.kind", "linear or upernet")
    integers = all(type(i) is int for i in model.out_indices)
    _expect(integers and len(model.out_indices) >= 1, recipe, "model.out_indices", "numbers of blocks")
    _expect(not model.fpn or len(model.out_indices) == 4, recipe, "model.out_indices", "four blocks with model.fpn")
    if head.kind == "upernet":
        maps = len(model.out_indices)
        _expect(0 <= head.auxiliary_index < maps, recipe, "head.auxiliary_index", f"a number from 0 to {maps - 1}")
    betas = optimization.betas
    _expect(len(betas) == 2 and all(0 <= b < 1 for b in betas), recipe, "optim.betas", "two numbers from 0 to below 1")
    ratio = augment.ratio
    _expect(
        len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf, recipe, "augment.ratio", "two ascending numbers over 0"
    )
    for name, value in (
        ("model.image_size", model.image_size),
        ("augment.crop", augment.crop),
        ("test.crop", test.crop),
    ):
        _expect(value % model.patch_size == 0, recipe, name, f"a multiple of model.patch_size={model.patch_size}")
    _expect(test.stride <= test.crop, recipe, "test.stride", f"at most test.crop={test.crop}")
    _expect(test.short_side >= 0, recipe, "test.short_side", "at least 0")
    _expect(run.seed >= 0, recipe, "run.seed", "at least 0")
    _expect(data.batch % data.micro_batch == 0, recipe, "data.batch", f"a multiple of micro_batch={data.micro_batch}")


def _expect(holds: bool, recipe: Recipe, name: str, expected: str) -> None:
    if not holds:
        table, key = name.split(".")
        raise ValueError(f"{name}: expected {expected}, got {getattr(getattr(recipe, table), key)!r}")


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
