"""Trains a segmentation head, or a whole InternViT with one, on a folder of images and masks.

    cd examples/segmentation
    python train.py recipes/linear_probing.toml --data ADEChallengeData2016 --classes 150 --out runs/linear

DATA holds images/training, images/validation, annotations/training and annotations/validation, as ADE20K does; a mask
is a PNG of at most 8 bits with its image's name. OUT gets checkpoint.pt, log.csv and predictions.png. After an
interruption or a kill the same command continues from the last checkpoint, and ends with the same bits on the same
machine. It does not continue with other images, masks, classes, settings or weights of a frozen tower.

    torchrun --nproc-per-node 8 train.py ... --device cuda      by FSDP2; data.batch is that of all ranks together

OUT must then be a folder that all ranks see. A run may continue on another number of ranks.
"""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from checkpoints import Log, check_picture, read_checkpoint, write_checkpoint
from ranks import Ranks
from recipe import Recipe, build, optimizer_and_schedule, read_recipe
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from internvit.cli.environment import usable_device
from internvit.data.digest import content_digest, tensors_digest
from internvit.dense.segmentation import Pair, Scores, Segmenter, find_pairs
from internvit.dense.segmentation.evaluation import draw_predictions, evaluate, predict_classes
from internvit.dense.segmentation.folder import batches, read_pair
from internvit.dense.segmentation.heads import check_num_classes
from internvit.files import locked
from internvit.images import printable, read_file

logger = logging.getLogger("train")


class Samples(Dataset):
    """Training samples by (step, place in the batch, pair): the same whoever makes them, and when."""

    def __init__(self, pairs: tuple[Pair, ...], recipe: Recipe, num_classes: int) -> None:
        self.pairs, self.recipe, self.num_classes = pairs, recipe, num_classes

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        step, place, index = key
        image, classes = read_pair(self.pairs[index], self.num_classes, self.recipe.data.reduce_zero_label)
        return self.recipe.augment(image, classes, np.random.default_rng([self.recipe.run.seed, 1, step, place]))


class Order:
    """The keys of `Samples` from a step on, one of the rank's micro-batches after the other, to the run's end."""

    def __init__(self, recipe: Recipe, count: int, start: int, ranks: Ranks) -> None:
        self.recipe, self.count, self.start, self.ranks = recipe, count, start, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        data, steps = self.recipe.data, self.recipe.optim.steps
        chosen = batches(self.count, data.batch, self.recipe.run.seed, self.start)
        for step, indices in zip(range(self.start, steps), chosen, strict=False):
            keys = [(step, place, index) for place, index in enumerate(indices)]
            groups = [keys[i : i + data.micro_batch] for i in range(0, data.batch, data.micro_batch)]
            yield from groups[self.ranks.rank :: self.ranks.count]


def trained_state(state: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """The part of a state dict that training changes, without a frozen tower."""
    tower = ("backbone.embeddings.", "backbone.encoder.") if recipe.model.freeze else ()
    return {name: tensor for name, tensor in state.items() if not name.startswith(tower)}


def fingerprint(
    model: Segmenter, recipe: Recipe, folder: Path, pairs: dict[str, tuple[Pair, ...]], names: list[str]
) -> dict[str, Any]:
    """What a checkpoint does not hold and a resumed run must find unchanged: classes, frozen weights, all files."""
    trained = trained_state(model.state_dict(), recipe)
    frozen = [(name, tensor) for name, tensor in model.state_dict().items() if name not in trained]
    files = {
        split: {printable(path.relative_to(folder)): content_digest(read_file(path)) for pair in both for path in pair}
        for split, both in pairs.items()
    }
    return {"classes": list(names), "frozen weights": tensors_digest(frozen), "files": files}


def differences(state: dict[str, Any], recipe: Recipe, data: dict[str, Any]) -> list[str]:
    """What a checkpoint was written with and this run is not, in words."""
    settings = recipe.to_dict()
    changed = [
        f"{table}.{key}"
        for table, values in settings.items()
        for key, value in values.items()
        if state["recipe"].get(table, {}).get(key) != value
    ]
    changed += [f"the {name}" for name in ("classes", "frozen weights") if state["data"].get(name) != data[name]]
    for split, files in data["files"].items():
        stored = state["data"].get("files", {}).get(split, {})
        others = [path for path in {**stored, **files} if stored.get(path) != files.get(path)]
        if others:
            changed.append(f"{len(others)} {split} files such as {others[0]}")
        elif list(stored) != list(files):
            changed.append(f"the order of the {split} files")
    return changed


def resume(
    place: Path, recipe: Recipe, model: Segmenter, optimizer: Any, schedule: Any, data: dict[str, Any], ranks: Ranks
) -> int:
    """Restores the checkpoint at `place`, if there is one; returns the number of steps made.

    Raises:
        ValueError: it is no checkpoint, or one of a run with other settings, weights or data; the message names them.
    """
    state = read_checkpoint(place)
    if state is None:
        return 0
    changed = differences(state, recipe, data)
    if changed:
        raise ValueError(f"{place}: written with other {', '.join(changed)}; give another --out, or what it had")
    expected = trained_state(model.state_dict(), recipe).keys()
    if expected != state["model"].keys():
        odd = sorted(expected ^ state["model"].keys())
        raise ValueError(f"{place}: its model has missing or unknown parameters such as {odd[0]}")
    try:
        ranks.load(state, model, optimizer)
        schedule.load_state_dict(state["schedule"])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: does not fit this run: {error}") from error
    logger.info("going on from step %d of %s", state["step"], place)
    return state["step"]


def step_once(model: Segmenter, samples: Iterator, recipe: Recipe, ranks: Ranks) -> float:
    """Gradients of one batch, added up over its micro-batches; returns the loss."""
    device = ranks.device
    parts = recipe.data.batch // recipe.data.micro_batch // ranks.count
    autocast = recipe.model.precision == "bfloat16" and not recipe.model.freeze
    total = 0.0
    for _ in range(parts):
        pixels, labels = (x.to(device) for x in next(samples))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            loss = model.loss(pixels, labels) / parts
        loss.backward()
        total += loss.item()
    return ranks.mean(total)


def train(
    recipe: Recipe,
    folder: Path,
    pairs: dict[str, tuple[Pair, ...]],
    names: list[str],
    out: Path,
    ranks: Ranks,
    workers: int,
) -> Scores:
    """Trains to the recipe's last step, from the checkpoint in `out` if there is one; returns the last scores."""
    torch.manual_seed(recipe.run.seed)
    model = build(recipe, len(names), ranks.device)
    data = fingerprint(model, recipe, folder, pairs, names)
    ranks.shard(model)
    ranks.seed(recipe.run.seed)
    optimizer, schedule = optimizer_and_schedule(recipe, model)
    steps, every = recipe.optim.steps, recipe.run
    place = out / "checkpoint.pt"
    start = resume(place, recipe, model, optimizer, schedule, data, ranks)
    log = Log(out / "log.csv" if ranks.first else None, start)
    samples = sample_batches(recipe, pairs["training"], len(names), start, workers, ranks)
    scores = None
    with tqdm(total=steps, initial=start, unit="step", disable=None if ranks.first else True) as bar:
        for step in range(start + 1, steps + 1):
            loss = step_once(model, samples, recipe, ranks)
            if not math.isfinite(loss):
                raise ValueError(f"step {step}: the loss is {loss}; the checkpoint before it is {place}")
            lr = max(group["lr"] for group in optimizer.param_groups)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            if step % every.log_every == 0 or step == steps:
                bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
                log.add(step, loss, lr)
            if step % every.evaluate_every == 0 or step == steps:
                scores = evaluate(model, pairs["validation"], len(names), recipe.test, recipe.model.patch_size)
                log.add(step, miou=scores.miou)
                draw(model, pairs["validation"], names, recipe, out / "predictions.png" if ranks.first else None)
            if step % every.checkpoint_every == 0 or step == steps:
                state = ranks.state(model, optimizer) | {"recipe": recipe.to_dict(), "data": data, "step": step}
                state |= {"model": trained_state(state["model"], recipe), "schedule": schedule.state_dict()}
                if ranks.first:
                    write_checkpoint(place, state)
    return scores or evaluate(model, pairs["validation"], len(names), recipe.test, recipe.model.patch_size)


def sample_batches(
    recipe: Recipe, pairs: tuple[Pair, ...], num_classes: int, start: int, workers: int, ranks: Ranks
) -> Iterator:
    """This rank's micro-batches (pixels, labels) from a step on."""
    loader: Any = DataLoader(
        Samples(pairs, recipe, num_classes),
        batch_sampler=Order(recipe, len(pairs), start, ranks),
        num_workers=workers,
        multiprocessing_context="spawn" if workers else None,  # a forked child hangs in torch's thread pool
        generator=torch.Generator(),  # else it draws from the generator of dropout
    )
    return iter(loader)


def draw(model: Segmenter, pairs: tuple[Pair, ...], names: list[str], recipe: Recipe, path: Path | None) -> None:
    """The first validation images, their masks and predictions; without a path they are computed alone."""
    rows = []
    training = model.training
    model.eval()
    for pair in pairs[:4]:
        image, classes = read_pair(pair, len(names), recipe.test.reduce_zero_label)
        rows.append((image, classes, predict_classes(model, image, recipe.test, recipe.model.patch_size).numpy()))
    model.train(training)
    if path is not None:
        draw_predictions(path, rows, ("image", "mask", "prediction"), names)


def class_names(value: str) -> list[str]:
    """Names of the classes: a number of them, or a text file with one a line.

    Raises:
        ValueError: one or none, among which there is nothing to learn; more than masks of 8 bits hold; a name twice.
    """
    if value.isdecimal():
        check_num_classes(int(value), least=2)
        return [str(k) for k in range(int(value))]
    try:
        lines = Path(value).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes: {value} is not a text file in UTF-8") from error
    names = [line.strip() for line in lines if line.strip()]
    check_num_classes(len(names), least=2)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"--classes: {value} has {', '.join(twice)} more than once")
    return names


def read_pairs(data: Path, num_classes: int, recipe: Recipe, broken: str) -> dict[str, tuple[Pair, ...]]:
    """The images and masks of both splits; of the training images the recipe's fraction."""
    pairs = {}
    for split in ("training", "validation"):

        def reading(both: Any, split: str = split) -> Any:
            return tqdm(both, desc=f"reading {split}", unit="image", disable=None)

        folders = data / "images" / split, data / "annotations" / split
        result = find_pairs(*folders, num_classes, broken, recipe.data.reduce_zero_label, reading)
        click.echo(f"{split}: {len(result.pairs)} images, {len(result.left_out)} files left out")
        pairs[split] = result.pairs
    count = max(round(len(pairs["training"]) * recipe.data.fraction), 1)
    order = np.random.default_rng([recipe.run.seed, 2]).permutation(len(pairs["training"]))
    pairs["training"] = tuple(pairs["training"][i] for i in sorted(order[:count]))
    return pairs


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Folder as ADE20K's; see above.")
@click.option("--classes", required=True, help="How many, from 2 on, or a text file with their names, one a line.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder of the run.")
@click.option("--weights", help="A checkpoint folder, file or hub id, instead of the recipe's.")
@click.option("--set", "changes", multiple=True, help="TABLE.KEY=VALUE of the recipe, such as optim.steps=100.")
@click.option("--broken", type=click.Choice(["raise", "skip"]), default="raise", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--workers", type=click.IntRange(0), default=0, show_default=True, help="Processes that make samples.")
def main(
    recipe: Path,
    data: Path,
    classes: str,
    out: Path,
    weights: str | None,
    changes: tuple[str, ...],
    broken: str,
    device: str,
    workers: int,
) -> None:
    """Train by RECIPE on a folder of images and masks; continue if OUT has a checkpoint.

    A broken image or a mask that does not fit is named; with --broken skip it is left out, else the run stops.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if weights:  # TOML's strings are JSON's
            changes = (*changes, f"model.weights={json.dumps(weights, ensure_ascii=False)}")
        chosen = read_recipe(recipe, changes)
        names = class_names(classes)
        usable_device(device)
        ranks = Ranks(device)
        if chosen.data.batch % (chosen.data.micro_batch * ranks.count):
            micro = f"{ranks.count} ranks x data.micro_batch={chosen.data.micro_batch}"
            raise ValueError(f"data.batch: expected a multiple of {micro}, got {chosen.data.batch}")
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, wait=False) if ranks.first else contextlib.nullcontext():
            if ranks.first:
                check_picture(out / "predictions.png")
            pairs = read_pairs(data, len(names), chosen, broken)
            scores = train(chosen, data, pairs, names, out, ranks, workers)
    except (ValueError, OSError, ImportError) as error:
        click.echo(f"train: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    ranks.close()
    if ranks.first:
        click.echo(f"mIoU {100 * scores.miou:.1f}, pixel accuracy {100 * scores.accuracy:.1f}: {out}")


if __name__ == "__main__":
    main()
