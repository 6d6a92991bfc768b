"""`internvit precision`: how far bfloat16 and int8 are from float32 on your images."""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from internvit.cli.network import load_network, network_options

_MAX_DRAWN = 16


@click.command()
@network_options
@click.option("--skip", multiple=True, help="Linears that stay bfloat16; the first and the last block by default.")
@click.option("--pca", type=click.Path(dir_okay=False, path_type=Path), help="Draw bfloat16 beside int8 here.")
@click.option("--overwrite", is_flag=True, help="Replace --pca.")
@click.option("--json", "as_json", is_flag=True, help="For scripts.")
def precision(
    images: tuple[str, ...],
    model: str | None,
    weights: str | None,
    prefix: str | None,
    size: tuple[int, int] | None,
    skip: tuple[str, ...],
    pca: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """How far the hidden states of IMAGES are from float32, in bfloat16 and with Linears in int8, on this CPU.

    "alone" is what a block's int8 Linears add to the error at the end: what to --skip.

    \b
    Example:
      internvit precision photos/ --weights ./checkpoint --skip encoder.layers.0 --skip '*.mlp.fc2'
    """
    from internvit.data.pca import check_picture, draw_pca_columns, make_folder
    from internvit.images import find_images, load_pixels
    from internvit.inference import linear_int8
    from internvit.inference.compare import StateError, compare_precisions

    if overwrite and not pca:
        raise click.UsageError("--overwrite: goes with --pca")
    reason = linear_int8.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"nothing to compare: {reason}")
    paths = find_images(images)
    if pca:
        check_picture(pca, paths, overwrite)
    network, _ = load_network(model, weights, prefix, "float32", "cpu")
    if pca:
        make_folder(pca)
    height, width = size or network.config.image_hw
    report = compare_precisions(network, [load_pixels(path, (height, width))[None] for path in paths], skip or None)
    if pca:
        draw_pca_columns(
            pca,
            paths[:_MAX_DRAWN],
            [[x[0] for x in pair] for pair in report.features[:_MAX_DRAWN]],
            (height, width),
            network.config.patch_size,
            ("bfloat16", "int8"),
        )
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
        return
    title = f"{len(paths)} images at {height}x{width}, against float32"
    table = Table("after", title=title, title_justify="left")
    for heading in ("bfloat16", "channel", "int8", "channel", "cosine", "alone"):
        table.add_column(heading, justify="right")

    def row(name: str, plain: StateError, quantised: StateError, alone: str) -> None:
        errors = (plain.relative, plain.channel, quantised.relative, quantised.channel)
        table.add_row(name, *(f"{e:.2%}" for e in errors), f"{quantised.cosine:.4f}", alone)

    names = ["embeddings", *(f"block {i}" for i in range(len(report.alone)))]
    for name, plain, quantised, alone in zip(names, report.bfloat16, report.int8, [None, *report.alone], strict=True):
        row(name, plain, quantised, "" if alone is None else f"{alone:.2%}")
    Console().print(table)
    click.echo("relative error; channel: the median channel's; cosine: the smallest of any token, int8")
    click.echo(f"in bfloat16: {', '.join(report.skipped) or 'none'}")
