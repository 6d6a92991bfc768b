"""A real segmentation run on two CPU cores: a trained, frozen ViT-S/14 under a linear head and under UPerNet.

    python examples/segmentation/real_run.py WORK docs/       # both pictures and the table of docs/segmentation.md

The tower is the trained network of examples/trained_vit_s.py without its final LayerNorm, the data the set that
composed.py makes. Beside it stand: a constant predictor (the most frequent class of the training masks); the same
tower with random weights; the reference backend; maps disturbed by as much as the backends differ; another seed. The
tower is frozen, so its maps are computed once and kept in WORK; heads learn on them. Interrupted, the same command
goes on.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from composed import NAMES, compose
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import trained_vit_s

import internvit
from internvit.dense.pyramid import FeaturePyramid
from internvit.dense.segmentation import (
    LinearHead,
    Pair,
    Scores,
    Segmenter,
    UPerNetHead,
    find_pairs,
    score,
    segmentation_loss,
)
from internvit.dense.segmentation.evaluation import Testing, draw_predictions, predict_classes
from internvit.dense.segmentation.folder import batches, read_pair
from internvit.files import atomic_write
from internvit.images import load_pixels

OUT_INDICES = (2, 5, 8, 11)
BATCH = {"linear": 8, "upernet": 4}
TITLES = {"linear": "linear", "upernet": "UPerNet"}
STEPS = {"linear": 300, "upernet": 500}
SHOWN = (0, 2, 3, 4)


class Setting(NamedTuple):
    """One row of the table: which tower, on which backend, the head's seed, and relative noise put on the maps.

    The head of a row with a precision has learned on the maps in float32, and is scored on those of
    `optimize_for_inference(precision=...)`.
    """

    title: str
    weights: str
    backend: str
    seed: int = 0
    noise: float = 0.0
    precision: str | None = None


SETTINGS = {
    "trained": Setting("trained", "trained", "auto"),
    "random": Setting("random weights", "random", "auto"),
    "reference": Setting("trained, `reference` backend", "trained", "reference"),
    # As much as the backends' maps differ by (1.2e-6 to 2.7e-6): what rounding alone does to a training run.
    "noise": Setting("trained, maps disturbed by 2e-6", "trained", "auto", noise=2e-6),
    "bf16": Setting("trained, scored in bfloat16", "trained", "auto", precision="bf16"),
    "int8": Setting("trained, scored in int8", "trained", "auto", precision="int8"),
    "seed": Setting("trained, another seed of the head", "trained", "auto", seed=1),
}


class NarrowUPerNet(nn.Module):
    """UPerNet on OpenGVLab's pyramid, each map brought to 64 channels first: two CPU cores train it in minutes."""

    def __init__(self, width: int, channels: int = 64) -> None:
        super().__init__()
        self.narrow = nn.ModuleList(nn.Conv2d(width, channels, kernel_size=1) for _ in OUT_INDICES)
        self.pyramid = FeaturePyramid(channels)
        self.upernet = UPerNetHead((channels,) * 4, len(NAMES), hidden_size=32)
        self.auxiliary_weight = self.upernet.auxiliary_weight

    def levels(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.pyramid([conv(x) for conv, x in zip(self.narrow, maps, strict=True)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.upernet(self.levels(maps))

    def auxiliary(self, maps: Sequence[Tensor]) -> Tensor:
        return self.upernet.auxiliary(self.levels(maps))


def new_head(kind: str) -> Any:
    width = trained_vit_s.CONFIG.hidden_size
    return LinearHead(width, len(NAMES)) if kind == "linear" else NarrowUPerNet(width)


def tower(weights: str) -> internvit.InternViT:
    if weights == "trained":
        return trained_vit_s.TrainedViTS().tower
    torch.manual_seed(0)
    # With InternViT's own start (embeddings of unit variance, LayerScale 0.1) maps are positions and little else, and
    # the linear head's mIoU is 11 %: this is the stronger untrained tower.
    model = internvit.InternViT(trained_vit_s.CONFIG.replace(initializer_factor=1.0)).eval()
    with torch.no_grad():
        model.embeddings.position_embedding.mul_(0.02)
        model.embeddings.class_embedding.mul_(0.02)
    return model


def backbone(weights: str) -> internvit.InternViTBackbone:
    return internvit.InternViTBackbone.from_model(tower(weights), None, OUT_INDICES, freeze=True).eval()


def maps_of(setting: Setting) -> Callable[[Tensor], Sequence[Tensor]]:
    """The tower's maps [1, C, 16, 16] of pixels, after each of OUT_INDICES, in float32."""
    if setting.precision is None:
        return backbone(setting.weights)
    half = tower(setting.weights).bfloat16()
    fast = internvit.optimize_for_inference(half, out_dtype=torch.float32, precision=setting.precision)

    def maps(pixels: Tensor) -> list[Tensor]:
        hidden = fast(pixels, output_hidden_states=True).hidden_states
        return [hidden[1 + i][:, 1:].mT.unflatten(-1, (16, 16)).contiguous() for i in OUT_INDICES]

    return maps


@torch.no_grad()
def cached_maps(setting: Setting, pairs: tuple[Pair, ...], split: str, work: Path) -> list[Tensor]:
    """The frozen tower's maps [n, C, 16, 16] of a split, after each of OUT_INDICES."""
    parts = (setting.weights, setting.precision or setting.backend, split)
    place = work / "maps" / f"{'-'.join(parts)}.safetensors"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        network, per_image = maps_of(setting), []
        with internvit.backend(setting.backend):
            for pair in tqdm(pairs, desc=place.stem, disable=None):
                per_image.append(network(load_pixels(pair.image, (224, 224))[None]))
        with atomic_write(place) as temporary:
            save_file({str(i): torch.cat(maps) for i, maps in enumerate(zip(*per_image, strict=True))}, temporary)
    loaded, generator = load_file(place), torch.Generator().manual_seed(0)
    maps = [loaded[str(i)] for i in range(len(OUT_INDICES))]
    return [x + setting.noise * x.std() * torch.randn(x.shape, generator=generator) for x in maps]


def masks(pairs: tuple[Pair, ...]) -> Tensor:
    return torch.stack([torch.from_numpy(read_pair(p, len(NAMES))[1].astype(np.int64)) for p in pairs])


@torch.no_grad()
def predictions(head: Any, maps: list[Tensor]) -> Iterator[Tensor]:
    head.eval()
    for i in range(maps[0].shape[0]):
        logits = head([x[i : i + 1] for x in maps])
        yield F.interpolate(logits, (224, 224), mode="bilinear", align_corners=False)[0].argmax(0)


def learn(kind: str, seed: int, maps: list[Tensor], labels: Tensor) -> tuple[Any, list[float]]:
    """A head trained on cached maps, and its loss at each step: AdamW, 1e-3, falling linearly to 0."""
    torch.manual_seed(seed)
    head, steps = new_head(kind).train(), STEPS[kind]
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    order = batches(labels.shape[0], BATCH[kind], seed)
    for _, chosen in zip(tqdm(range(steps), desc=kind, disable=None), order, strict=False):
        loss = segmentation_loss(head, [x[chosen] for x in maps], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return head, losses


def check_assembled(head: Any, setting: Setting, pair: Pair, expected: Tensor) -> float:
    """The share of pixels in which a whole `Segmenter` on the image predicts the class that cached maps gave."""
    whole = Segmenter(backbone(setting.weights), head).eval()
    image, _ = read_pair(pair, len(NAMES))
    how = Testing(crop=224, stride=112, short_side=0)
    with internvit.backend(setting.backend):
        return (predict_classes(whole, image, how, patch_size=14) == expected).double().mean().item()


def run(name: str, kind: str, work: Path, pairs: dict[str, tuple[Pair, ...]]) -> dict[str, Any]:
    """Trains one head on one setting's maps and scores it; an earlier result is read instead."""
    place = work / "results" / f"{name}-{kind}.json"
    if not place.exists():
        setting = SETTINGS[name]
        training = cached_maps(setting._replace(precision=None), pairs["training"], "training", work)
        validation = cached_maps(setting, pairs["validation"], "validation", work)
        head, losses = learn(kind, setting.seed, training, masks(pairs["training"]))
        predicted, labels = list(predictions(head, validation)), masks(pairs["validation"])
        scores = score(zip(predicted, labels, strict=True), len(NAMES))
        agreement = 1.0  # a Segmenter's tower is in float32
        if setting.precision is None:
            agreement = check_assembled(head, setting, pairs["validation"][0], predicted[0])
        result = {"losses": losses, "shown": [predicted[i].tolist() for i in SHOWN], "assembled": agreement}
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(place) as temporary:
            temporary.write_text(json.dumps({**result, **scores._asdict()}))
    return json.loads(place.read_text())


def constant(pairs: dict[str, tuple[Pair, ...]]) -> Scores:
    """Scores of calling everything the training masks' most frequent class."""
    frequent = masks(pairs["training"]).flatten().bincount().argmax()
    labels = masks(pairs["validation"])
    return score(((torch.full_like(x, int(frequent)), x) for x in labels), len(NAMES))


def table(results: dict[tuple[str, str], dict[str, Any]], always: Scores) -> str:
    """Markdown: mIoU, pixel accuracy and each class's IoU, in percent."""
    lines = [f"| features | head | mIoU | pixels right | {' | '.join(NAMES)} |", "|---" * (4 + len(NAMES)) + "|"]

    def row(features: str, head: str, iou: list[float], miou: float, accuracy: float) -> str:
        cells = (f"{100 * x:.1f}" for x in (miou, accuracy, *iou))
        return f"| {features} | {head} | {' | '.join(cells)} |"

    lines.append(row("none", "the most frequent class", list(always.iou), always.miou, always.accuracy))
    for (name, kind), r in results.items():
        lines.append(row(SETTINGS[name].title, TITLES[kind], r["iou"], r["miou"], r["accuracy"]))
    return "\n".join(lines)


def draw_curves(out: Path, results: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The loss of every run, a mean over ten steps each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    styles = {
        "trained": ("tab:blue", "-"),
        "random": ("tab:red", "-"),
        "reference": ("black", ":"),
        "seed": ("tab:cyan", "-"),
    }
    for axis, kind in zip(figure.subplots(1, 2), STEPS, strict=True):
        for name, (colour, style) in styles.items():
            if (name, kind) in results:
                means = np.reshape(results[name, kind]["losses"], (-1, 10)).mean(1)
                label = SETTINGS[name].title.replace("`", "")
                axis.plot(np.arange(len(means)) * 10 + 5, means, color=colour, linestyle=style, label=label)
        axis.set(title=f"{TITLES[kind]} head", xlabel="step", ylabel="training loss", yscale="log")
        axis.legend(fontsize=7)
    figure.savefig(out, dpi=100)


@click.command()
@click.argument("work", type=click.Path(file_okay=False, path_type=Path))
@click.argument("docs", type=click.Path(file_okay=False, path_type=Path))
@click.option("--only", help="SETTING-HEAD: this one alone, without table and pictures.")
def main(work: Path, docs: Path, only: str | None) -> None:
    """Compose the data in WORK, train every head, and write the pictures to DOCS; prints the table."""
    if not (work / "data" / "classes.txt").exists():
        compose(work / "data")
    folders = {
        split: (work / "data" / "images" / split, work / "data" / "annotations" / split)
        for split in ("training", "validation")
    }
    pairs = {split: find_pairs(*both, len(NAMES)).pairs for split, both in folders.items()}
    todo = [(name, kind) for kind in STEPS for name in SETTINGS if name != "seed" or kind == "linear"]
    if only:
        run(*only.split("-"), work, pairs)
        return
    results = {key: run(*key, work, pairs) for key in todo}
    print(table(results, constant(pairs)))
    for kind in STEPS:
        moved = 100 * (results["int8", kind]["miou"] - results["bf16", kind]["miou"])
        print(f"{TITLES[kind]}: mIoU in int8 {moved:+.2f} points from bfloat16's")
        a, b, c = (np.array(results[name, kind]["losses"]) for name in ("trained", "reference", "noise"))
        for what, other in (("on the reference backend", b), ("with disturbed maps", c)):
            apart = np.abs(a - other)
            print(
                f"{TITLES[kind]}: losses {what} differ by {apart[:10].max():.1e} in ten steps, {apart.max():.1e} in all"
            )
    print(
        "assembled networks agree with cached maps in", min(r["assembled"] for r in results.values()), "of the pixels"
    )
    rows = []
    for place, i in enumerate(SHOWN):
        image, mask = read_pair(pairs["validation"][i], len(NAMES))
        columns = (("trained", "linear"), ("trained", "upernet"), ("random", "linear"), ("random", "upernet"))
        rows.append([image, mask, *(np.array(results[key]["shown"][place]) for key in columns)])
    titles = ("image", "mask", "linear", "UPerNet", "linear, random tower", "UPerNet, random tower")
    draw_predictions(docs / "segmentation.png", rows, titles, NAMES, dpi=70)
    draw_curves(docs / "segmentation-curves.png", results)


if __name__ == "__main__":
    main()
