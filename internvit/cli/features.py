"""`internvit features`: features of images into one safetensors file, or into a folder of shards."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from internvit.cli.environment import usable_device
from internvit.cli.network import (
    DTYPES,
    Layers,
    configuration,
    dtype_beside,
    load_in_precision,
    load_network,
    network_options,
    precision_options,
    source_of,
)

if TYPE_CHECKING:
    from internvit.data.bulk import BulkExtraction, Engine
    from internvit.model.vit import InternViT

_POOLINGS = ("class", "mean", "tokens", "map", "connector")
_FOLDER_ONLY = {  # and their defaults
    **dict(engine="local", address=None, workers=None, format="parquet", pooling=None, connector=None, tiles=0),
    **dict(keep_size=False, out_dtype="float32", shard=None, column=None, retry_failed=False),
}
# Names that somebody gives to a file, of formats that are not written.
_OTHER_FILES = (".npz", ".npy", ".pt", ".pth", ".pkl", ".bin", ".h5", ".hdf5", ".csv", ".json", ".tar", ".zip")


def _folder_options(command: Callable) -> Callable:
    """What goes with a folder as --out only."""
    options = (
        click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True),
        click.option("--address", help="A running Ray cluster, or auto; one on this machine is started by default."),
        click.option("--workers", type=click.IntRange(1), help="Models on Ray, one a GPU; decoding threads if local."),
        click.option("--format", type=click.Choice(["parquet", "safetensors"]), default="parquet", show_default=True),
        click.option(
            "--pooling", type=click.Choice(_POOLINGS), help="What is kept of an image; the class token if none."
        ),
        click.option("--connector", help="A whole InternVL's checkpoint, for --pooling connector."),
        click.option("--tiles", type=click.IntRange(0), default=0, help="Cut images into at most so many tiles."),
        click.option("--keep-size", is_flag=True, help="Each image's own size, in whole patches; not --size."),
        click.option("--out-dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True),
        click.option("--shard", type=click.IntRange(1), help="Images in a file."),
        click.option("--column", help="Of Parquet files, with the images."),
        click.option("--retry-failed", is_flag=True, help="Compute shards with failed images again."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@network_options
@click.option(
    "--layers", type=Layers(), help="Blocks whose output to keep, 0 the first; the last hidden state if none."
)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@precision_options
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images at once.")
@click.option("--out", required=True, help="A .safetensors file, or a folder (path or URL).")
@click.option("--pca", type=click.Path(dir_okay=False, path_type=Path), help="Draw the principal components here.")
@click.option("--strict", is_flag=True, help="A file that cannot be read, or has an inf or NaN, is an error.")
@click.option("--overwrite", is_flag=True, help="Replace --out, --pca and an interrupted run's parts.")
@_folder_options
def features(
    images: tuple[str, ...],
    model: str | None,
    weights: str | None,
    prefix: str | None,
    size: tuple[int, int] | None,
    layers: tuple[int, ...] | None,
    dtype: str,
    device: str,
    precision: str | None,
    skip: tuple[str, ...],
    batch: int,
    out: str,
    pca: Path | None,
    strict: bool,
    overwrite: bool,
    **folder: Any,
) -> None:
    """Write the features of IMAGES: files, folders, globs; into a folder also text lists, Parquet, tars and URLs.

    A .safetensors file gets all tokens of each image, [1 + patches, width], named "PATH:last", or "PATH:7" for block 7.
    A folder gets shards of Parquet or safetensors with what --pooling keeps, computed here or on Ray. After an
    interruption the same command continues where it stopped; with other weights or settings it is refused.

    \b
    Examples:
      internvit features cat.jpg --model internvit-300m-448px-v2.5 --out cat.safetensors --pca cat.png
      internvit features 'photos/**/*.jpg' --weights ./checkpoint --size 448x896 --layers 7,23 --out maps.safetensors
      internvit features shards/ --weights ./checkpoint --batch 32 --engine ray --address auto --out features/
    """
    from internvit.images import find_images

    if not (model or weights):
        raise click.UsageError("name the network: --model NAME, --weights PATH, or both")
    if folder["engine"] == "local":  # Ray's workers may have devices that there are none of here
        usable_device(device)
    if _is_one_file(out):
        given = [f"--{name.replace('_', '-')}" for name, value in folder.items() if value != _FOLDER_ONLY[name]]
        if given:
            raise click.UsageError(f"{', '.join(given)}: for a folder as --out, got the file {out}")
        target, paths = Path(out), find_images(images)
        _check_outputs(target, pca, paths, overwrite)
        how = {"layers": layers, "batch": batch, "strict": strict, "overwrite": overwrite}

        def network(dtype: str) -> "tuple[InternViT, str]":
            return load_network(model, weights, prefix, dtype, device)

        load = partial(load_in_precision, precision, skip, dtype, network)
        _write_features(paths, load, size, target, pca, how)
        return
    if pca or overwrite:
        raise click.UsageError("--pca, --overwrite: for a .safetensors file as --out; a folder is never replaced")
    if folder["keep_size"] and size:
        raise click.UsageError("--keep-size: not with --size")
    embedder = {
        **dict(name_or_path=source_of(model, weights), config=configuration(model, weights), prefix=prefix),
        **dict(dtype=dtype_beside(precision, skip, dtype), precision=precision, skip=skip or None),
        **dict(size="image" if folder["keep_size"] else size, layers=layers, device=device, batch=batch),
        **dict(pooling=folder["pooling"] or "class", connector=folder["connector"], tiles=folder["tiles"]),
        **dict(out_dtype=folder["out_dtype"], strict=strict),
    }
    _write_folder(images, out, embedder, strict, folder)


def _is_one_file(out: str) -> bool:
    """Whether --out names a .safetensors file, or else a folder; refuses other names."""
    if not out or (out.lower().endswith(_OTHER_FILES) and not Path(out).is_dir()):
        got = f"{out}; a folder may end with /" if out else "an empty name"
        raise click.UsageError(f"--out: expected a .safetensors file or a folder, got {got}")
    from internvit.data.storage import is_url

    one_file = out.lower().endswith(".safetensors")
    if one_file and is_url(out):
        raise click.UsageError(f"--out: a URL is for a folder of features, got {out}")
    return one_file


def _write_folder(
    sources: Iterable[str], out: str, embedder: dict[str, Any], strict: bool, folder: dict[str, Any]
) -> None:
    from internvit.data.bulk import extract_folder
    from internvit.images import printable

    how = {name: folder[name] for name in ("format", "shard", "column", "retry_failed")}
    how |= {"strict": strict, "engine": _engine(folder), "remote": folder["engine"] == "ray"}
    began = time.monotonic()
    with tqdm(unit="image", disable=None, smoothing=0.1) as bar:

        def progress(result: "BulkExtraction", total: int) -> None:
            nonlocal began
            if bar.total is None:
                bar.reset(total)
                bar.initial = bar.n = result.resumed
                bar.refresh()
                began = time.monotonic()
            bar.set_postfix(failed=result.failed, refresh=False)
            bar.update(result.images - bar.n)

        result = extract_folder(sources, out, embedder, progress=progress, **how)
    rate = (result.images - result.resumed) / (time.monotonic() - began)
    resumed = f", {result.resumed} of them from an earlier run" if result.resumed else ""
    speed = f", {rate:.1f} images/s" if result.images > result.resumed else ""
    click.echo(f"{result.images} images{resumed}{speed}: {printable(result.out)}")
    if result.images and result.failed == result.images:
        raise ValueError(f"none of {result.images} images has features: see {printable(result.out)}/failures")
    if result.failed:
        click.echo(f"{result.failed} failed: {printable(result.out)}/failures", err=True)


def _engine(folder: dict[str, Any]) -> "Engine":
    """The engine by its name; asked for before a model is loaded."""
    workers = {} if folder["workers"] is None else {"workers": folder["workers"]}
    if folder["engine"] == "local":
        from internvit.data.bulk import run_local

        if folder["address"]:
            raise click.UsageError("--address: goes with --engine ray")
        return partial(run_local, **workers)
    from internvit.data.ray_engine import import_ray, run_ray

    import_ray()
    return partial(run_ray, address=folder["address"], **workers)


def _write_features(
    paths: Sequence[Path],
    load: Callable[[], tuple[Any, str]],
    size: tuple[int, int] | None,
    target: Path,
    pca: Path | None,
    how: dict[str, Any],
) -> None:
    """Extracts, draws and prints; `load` gives the network and the name of its weights."""
    from internvit.data.extract import extract
    from internvit.data.pca import draw_pca, make_folder
    from internvit.images import printable

    def progress(waiting: Iterable[Path], total: int) -> Iterable[Path]:
        return tqdm(waiting, total=total, unit="image", disable=None)

    network, source = load()
    if pca:
        make_folder(pca)
    size = size or network.config.image_hw
    result = extract(network, paths, target, size, metadata={"weights": printable(source)}, progress=progress, **how)
    resumed = f", {result.resumed} of them from an interrupted run" if result.resumed else ""
    click.echo(f"{len(result.images)} images at {size[0]}x{size[1]}{resumed}: {printable(target)}")
    if result.skipped:
        click.echo(f"{len(result.skipped)} skipped: {', '.join(map(printable, result.skipped))}", err=True)
    if pca:
        drawn = draw_pca(pca, target, result.images, size, network.config.patch_size)
        click.echo(f"principal components of {drawn} of {len(result.images)} images: {printable(pca)}")


def _check_outputs(target: Path, pca: Path | None, images: Sequence[Path], overwrite: bool) -> None:
    """Refuses the output files before anything is loaded."""
    from internvit.data.pca import check_picture

    if (target.exists() or target.is_symlink()) and not overwrite:
        raise FileExistsError(f"{target} exists; give another --out, or --overwrite")
    if pca:
        if pca.absolute() == target.absolute():
            raise ValueError(f"--pca: expected another file than --out, got {pca} for both")
        check_picture(pca, images, overwrite)
