"""Features of many image files into one safetensors file, safe to interrupt at any moment.

Each image's features are written, atomically, into `OUT.partial/` as they come; the last step joins them into OUT and
removes the folder. A rerun with the same settings takes up what is there. The same features, to the bit, as
`model(load_pixels(path, size)[None])` gives.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from internvit.data.images import load_pixels, open_photo
from internvit.data.pca import pca_map
from internvit.files import atomic_write

if TYPE_CHECKING:
    from internvit.model.vit import InternViT

logger = logging.getLogger(__name__)


@dataclass
class Extraction:
    """What `extract` did.

    Attributes:
        out: the file written.
        images: files whose features it holds, in order.
        resumed: how many of them an earlier, interrupted run had left.
        skipped: broken files and why.
    """

    out: Path
    images: list[Path] = field(default_factory=list)
    resumed: int = 0
    skipped: dict[Path, str] = field(default_factory=dict)


@torch.inference_mode()
def image_features(model: "InternViT", pixels: Tensor, layers: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
    """Features of each image of a batch [B, 3, height, width].

    Returns:
        per image {"last": [N, C]}, or {"7": [N, C], ...} after each block of `layers` (negative ones from the end).
    """
    if layers is None:
        last = model(pixels.to(model.device)).last_hidden_state
        return [{"last": tokens.cpu()} for tokens in last]
    hidden_states = model(pixels.to(model.device), output_hidden_states=True).hidden_states[1:]
    chosen = {str(layer): hidden_states[layer] for layer in layers}
    return [{name: tokens[i].cpu().clone() for name, tokens in chosen.items()} for i in range(pixels.shape[0])]


def extract(
    model: "InternViT",
    images: Sequence[Path],
    out: Path,
    size: tuple[int, int],
    *,
    layers: Sequence[int] | None = None,
    batch: int = 1,
    strict: bool = False,
    overwrite: bool = False,
    settings: dict[str, str] | None = None,
    progress: Callable[[Iterable[Path], int], Iterable[Path]] = lambda images, total: images,
) -> Extraction:
    """Writes the features of image files to one safetensors file; see the file's head for how it may be interrupted.

    Args:
        model: in eval mode, on the device and in the dtype to run in.
        images: the files; the features are named "PATH:last", or "PATH:7" for layer 7.
        out: the file to write.
        size: (height, width) in pixels, multiples of the patch size.
        layers: blocks whose output is wanted, 0 the first; None for the last hidden state.
        batch: images a forward pass takes.
        strict: a broken image is an error; else it is skipped, logged and listed.
        overwrite: replace `out` if it exists.
        settings: further facts that tell one extraction from another, kept in the file's metadata.
        progress: wraps the iteration, as tqdm does.

    Raises:
        FileExistsError: `out` exists and overwrite is False.
        ValueError: size off the patch grid, no such layer, or with strict a broken image.
    """
    config = model.config
    if any(s <= 0 or s % config.patch_size for s in size):
        raise ValueError(f"size: expected multiples of {config.patch_size}, got {size[0]}x{size[1]}")
    depth = config.num_hidden_layers
    for layer in layers or ():
        if not -depth <= layer < depth:
            raise ValueError(f"layers: expected numbers from {-depth} to {depth - 1}, got {layer}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out} exists; give another name or allow overwriting")
    facts = {
        "size": f"{size[0]}x{size[1]}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": "last" if layers is None else ",".join(map(str, layers)),
        "config": json.dumps(config.to_dict(), sort_keys=True),
        **(settings or {}),
    }
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    result = Extraction(out)
    places = {path: partial / f"{_key(path, facts)}.safetensors" for path in images}
    waiting = [path for path in images if not places[path].exists()]
    result.resumed = len(images) - len(waiting)
    for chunk, pixels in _batches(progress(waiting, len(waiting)), size, batch, strict, result):
        for path, features in zip(chunk, image_features(model, pixels, layers), strict=True):
            _write({f"{path}:{name}": t for name, t in features.items()}, places[path])
    result.images = [path for path in images if path not in result.skipped]
    if not result.images:
        shutil.rmtree(partial)
        raise ValueError(f"none of {len(images)} files is an image that can be read")
    _join([places[path] for path in result.images], out, facts)
    shutil.rmtree(partial)
    return result


def _key(path: Path, facts: dict[str, str]) -> str:
    """Names an image's features by all that they depend on, the file's own size and time of change included."""
    try:
        stat = path.stat()
        version = f"{stat.st_size}-{stat.st_mtime_ns}"
    except OSError:
        version = "missing"
    return hashlib.sha256(json.dumps([str(path), version, facts], sort_keys=True).encode()).hexdigest()[:32]


def _batches(
    paths: Iterable[Path], size: tuple[int, int], batch: int, strict: bool, result: Extraction
) -> Iterator[tuple[list[Path], Tensor]]:
    chunk: list[Path] = []
    pixels: list[Tensor] = []
    for path in paths:
        try:
            loaded = load_pixels(path, size)
        except (ValueError, OSError) as error:
            if strict:
                raise
            result.skipped[path] = str(error)
            logger.warning("skipped %s", error if str(path) in str(error) else f"{path}: {error}")
            continue
        chunk.append(path)
        pixels.append(loaded)
        if len(chunk) == batch:
            yield chunk, torch.stack(pixels)
            chunk, pixels = [], []
    if chunk:
        yield chunk, torch.stack(pixels)


def _write(tensors: dict[str, Tensor], place: Path, metadata: dict[str, str] | None = None) -> None:
    with atomic_write(place) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)


def _join(places: Sequence[Path], out: Path, facts: dict[str, str]) -> None:
    tensors = {}
    for place in places:
        with safe_open(place, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a mapping)
    _write(tensors, out, facts)


def draw_pca(out: Path, features: Path, images: Sequence[Path], size: tuple[int, int], patch_size: int) -> int:
    """Draws each photograph and beside it the principal components of its last features; returns how many rows.

    At most 16 images are drawn; the file is replaced atomically.
    """
    from matplotlib.figure import Figure

    images = images[:16]
    grid = size[0] // patch_size, size[1] // patch_size
    figure = Figure(figsize=(7, 3.4 * len(images)), layout="constrained")
    with safe_open(features, framework="pt") as file:
        names = list(file.keys())
        for row, path in enumerate(images):
            tokens = file.get_tensor([n for n in names if n.rpartition(":")[0] == str(path)][-1])
            picture = open_photo(path).resize((size[1], size[0]))
            for column, shown in enumerate((np.asarray(picture), pca_map(tokens, grid).numpy())):
                axis = figure.add_subplot(len(images), 2, 2 * row + column + 1)
                axis.imshow(shown)
                axis.set_axis_off()
            figure.axes[2 * row].set_title(path.name, fontsize=9)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=110, format=out.suffix.lstrip(".") or "png")
    return len(images)
