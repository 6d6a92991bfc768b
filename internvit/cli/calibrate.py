"""`internvit calibrate`: a checkpoint with int8 Linears, rounded and chosen by your images."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from internvit.cli.network import load_network, network_options

if TYPE_CHECKING:
    from internvit.inference.calibrate import Calibration

_HELD_OUT = 4


@click.command()
@network_options
@click.option("--out", "folder", type=click.Path(file_okay=False, path_type=Path), required=True, help="A folder.")
@click.option("--target", type=click.FloatRange(0, 100, True), default=1.5, show_default=True, help="Error in percent.")
@click.option("--no-smooth", is_flag=True, help="Leave outlier channels where they are.")
@click.option("--overwrite", is_flag=True, help="Replace weights and config.json in --out.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def calibrate(
    images: tuple[str, ...],
    model: str | None,
    weights: str | None,
    prefix: str | None,
    size: tuple[int, int] | None,
    folder: Path,
    target: float,
    no_smooth: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Round a network's weights to int8 by IMAGES, and write it as a checkpoint to the folder --out.

    Every fourth image is held out. The Linears that add most to the error on those stay bfloat16, until it is within
    --target percent of float32's features on each of them. Some dozens of images like those in use are enough.

    \b
    Example:
      internvit calibrate photos/ --weights ./checkpoint --out ./int8
      internvit features photos/ --weights ./int8 --precision int8 --out features.safetensors
    """
    from internvit.checkpoint.save import refuse_to_replace
    from internvit.images import find_images, load_pixels
    from internvit.inference import calibrate as calibration
    from internvit.inference.optimize import optimize_for_inference

    if folder.is_dir():
        refuse_to_replace(folder, overwrite)
    paths = find_images(images)
    if len(paths) < 2:
        raise click.UsageError(f"IMAGES: expected at least 2, of which one is held out, got {len(paths)}")
    network, _ = load_network(model, weights, prefix, "float32", "cpu")
    if folder.is_dir():
        refuse_to_replace(folder, overwrite, network.config.to_dict())
    height, width = size or network.config.image_hw
    pixels = [load_pixels(path, (height, width))[None] for path in paths]
    held_out = [i for i in range(len(paths)) if i % _HELD_OUT == 1]

    def progress(layers: Sequence[int]) -> Iterable[int]:
        return tqdm(layers, unit="block", disable=None)

    result = calibration.calibrate(
        network,
        [x for i, x in enumerate(pixels) if i not in held_out],
        [pixels[i] for i in held_out],
        target / 100,
        not no_smooth,
        progress,
    )
    if len(result.skipped) == len(result.alone):  # nothing in such a checkpoint would say so
        raise click.ClickException(
            f"--target: no Linear can be int8 within {target:g} %, bfloat16 alone is off by "
            f"{max(result.bfloat16):.2%}; nothing is written"
        )
    fast = optimize_for_inference(result.model, precision="int8", skip=result.skipped)
    fast.save_pretrained(folder, overwrite=overwrite)
    if as_json:
        fields = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name != "model"}
        click.echo(json.dumps({**fields, "held_out": [str(paths[i]) for i in held_out]}, indent=2))
        return
    _show(result, [paths[i] for i in held_out], folder)


def _show(result: "Calibration", held_out: Sequence[Path], folder: Path) -> None:
    table = Table("held out", title="relative error of the median channel at the end", title_justify="left")
    for heading in ("bfloat16", "every Linear int8", "as written"):
        table.add_column(heading, justify="right")
    for path, *errors in zip(held_out, result.bfloat16, result.everywhere, result.errors, strict=True):
        table.add_row(path.name, *(f"{e:.2%}" for e in errors))
    Console().print(table)
    count = len(result.alone)
    click.echo(
        f"{count - len(result.skipped)} of {count} Linears in int8, {result.share:.0%} of their weights: {folder}"
    )
    click.echo(f"in bfloat16: {', '.join(result.skipped) or 'none'}")
