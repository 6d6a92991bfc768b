"""Features of many image files into one safetensors file; a run may be interrupted at any moment.

Each image's features are written into `OUT.partial/` as they are computed; the last step joins them into OUT and
removes the folder. A rerun with the same weights and settings continues; with others it is refused. The features have
the same bits as `model(load_pixels(path, size)[None])`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from internvit.data.digest import content_digest, tensors_digest
from internvit.data.finite import not_finite
from internvit.data.parts import open_parts
from internvit.images import decode_photo, printable, read_file, to_pixels

if TYPE_CHECKING:
    from internvit.model.vit import InternViT

logger = logging.getLogger(__name__)

_MAX_HEADER = 100_000_000  # bytes; safetensors refuses to read a longer one
_HEADER_ENTRY = 100  # bytes of a tensor's entry beside its name, at most


@dataclass
class Extraction:
    """What `extract` did.

    Attributes:
        out: the file written.
        images: files whose features it holds, in order.
        resumed: how many of them an earlier, interrupted run had computed.
        skipped: files that could not be read, or whose features are not finite, and why.
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
    metadata: dict[str, str] | None = None,
    progress: Callable[[Iterable[Path], int], Iterable[Path]] = lambda images, total: images,
) -> Extraction:
    """Writes the features of image files to one safetensors file; interrupted, the same call continues.

    Args:
        model: in eval mode, on the device and in the dtype to run in.
        images: the files; the features are named "PATH:last", or "PATH:7" for layer 7.
        out: the file to write.
        size: (height, width) in pixels, multiples of the patch size.
        layers: blocks whose output is wanted, 0 the first; None for the last hidden state.
        batch: images a forward pass takes.
        strict: a file that cannot be read, or has an infinite feature or NaN, is an error; otherwise it is skipped,
            logged and listed.
        overwrite: replace `out` if it exists, and parts of an interrupted run with other weights or settings.
        metadata: stored in the file's metadata beside the settings.
        progress: wraps the iteration, as tqdm does.

    Raises:
        FileExistsError: `out` exists and overwrite is False.
        ValueError: a size off the patch grid, no such layer, `out` among the images, `OUT.partial` of something else or
            of a run with other weights or settings, no image that has features, or with strict one that has none.
    """
    _check(model, images, out, size, layers, batch, overwrite)
    settings = _settings(model, size, layers)
    names = ["last"] if layers is None else [str(layer) for layer in layers]
    result = Extraction(out)
    with open_parts(out, settings, overwrite) as parts:
        done = {path for path in images if parts.is_current(path, [f"{path}:{name}" for name in names])}
        result.resumed = len(done)
        waiting = [path for path in images if path not in done]
        for chunk, pixels in _batches(progress(waiting, len(waiting)), size, batch, strict, result):
            for (path, digest), features in zip(chunk, image_features(model, pixels, layers), strict=True):
                if all(tensor.isfinite().all() for tensor in features.values()):
                    parts.write(path, digest, {f"{path}:{name}": tensor for name, tensor in features.items()})
                else:
                    _fail(ValueError(f"{printable(path)}: {not_finite(model.dtype)}"), path, strict, result)
        result.images = [path for path in images if path not in result.skipped]
        if result.images:
            _refuse_existing(out, overwrite)
            config = json.dumps(model.config.to_dict(), sort_keys=True)
            parts.join(result.images, out, {**settings, "config": config, **(metadata or {})})
        parts.remove()
    if not result.images:
        reason = next(iter(result.skipped.values()), "there are no files")
        raise ValueError(f"none of {len(images)} files is an image that has features: {reason}")
    return result


def _check(
    model: "InternViT",
    images: Sequence[Path],
    out: Path,
    size: tuple[int, int],
    layers: Sequence[int] | None,
    batch: int,
    overwrite: bool,
) -> None:
    config = model.config
    if any(s <= 0 or s % config.patch_size for s in size):
        raise ValueError(f"size: expected multiples of {config.patch_size}, got {size[0]}x{size[1]}")
    depth = config.num_hidden_layers
    for layer in layers or ():
        if not -depth <= layer < depth:
            raise ValueError(f"layers: expected numbers from {-depth} to {depth - 1}, got {layer}")
    if layers is not None and (not layers or len(set(layers)) != len(layers)):
        raise ValueError(f"layers: expected numbers of blocks, each once, got {tuple(layers)}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    header = sum(len(str(path)) + 8 + _HEADER_ENTRY for path in images) * len(layers or (0,))
    if header > _MAX_HEADER:
        raise ValueError(f"images: {len(images)} are too many for one safetensors file; write several")
    if out.exists() and any(path.exists() and path.samefile(out) for path in images):
        raise ValueError(f"{printable(out)}: is one of the images")
    _refuse_existing(out, overwrite)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if (out.exists() or out.is_symlink()) and not overwrite:
        raise FileExistsError(f"{printable(out)} exists; give another name or allow overwriting")
    if out.is_dir():
        raise ValueError(f"{printable(out)}: expected a file to write, got a folder")


def _settings(model: "InternViT", size: tuple[int, int], layers: Sequence[int] | None) -> dict[str, str]:
    """Everything that features depend on but the images; the weights by their bits."""
    from internvit import __version__

    return {
        "internvit": __version__,
        "weights_digest": tensors_digest(model.state_dict().items()),
        "size": f"{size[0]}x{size[1]}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": "last" if layers is None else ",".join(map(str, layers)),
        "device": model.device.type,
        "precision": getattr(model, "settings", "the model's own"),
        **{f"config.{key}": json.dumps(value) for key, value in model.config.to_dict().items()},
    }


def _batches(
    paths: Iterable[Path], size: tuple[int, int], batch: int, strict: bool, result: Extraction
) -> Iterator[tuple[list[tuple[Path, str]], Tensor]]:
    """Batches of (path, digest of the file) and pixels; files that cannot be read go into `result.skipped`."""
    chunk: list[tuple[Path, str]] = []
    pixels: list[Tensor] = []
    for path in paths:
        try:
            _check_name(path)
            data = read_file(path)
            loaded = to_pixels(decode_photo(data, path), size)
        except (ValueError, OSError) as error:
            _fail(error, path, strict, result)
            continue
        chunk.append((path, content_digest(data)))
        pixels.append(loaded)
        if len(chunk) == batch:
            yield chunk, torch.stack(pixels)
            chunk, pixels = [], []
    if chunk:
        yield chunk, torch.stack(pixels)


def _fail(error: Exception, path: Path, strict: bool, result: Extraction) -> None:
    if strict:
        raise error
    result.skipped[path] = str(error)
    logger.warning("skipped %s", error)


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{printable(path)}: the name is not UTF-8, as a tensor's has to be") from error
