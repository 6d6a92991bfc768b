"""Reading and writing InternViT checkpoints, streamed, strict and atomic.

Reading: find the files -> plan the conversion from their keys -> compare every shape -> only then allocate and copy, a
few rows at a time. The files are mapped; mapped pages count as the process's memory until the mapping goes, so a file
is closed and opened again after each sixteenth of the checkpoint.

Writing: every file goes to a temporary name, to the disk, and then to its own name; what makes the new weights current
comes after the weights, and what it replaces goes last.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from internvit.checkpoint.files import CONFIG, INDEX, WEIGHTS, Checkpoint, locate, naming, read_index
from internvit.checkpoint.resample import resize_embeddings
from internvit.config import InternViTConfig
from internvit.upstream.state_dict import (
    LAYOUTS,
    ConversionPlan,
    compare_shapes,
    conversion_plan,
    convert_state_dict,
    infer_config,
    target_shapes,
)

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

_WEIGHTS = re.compile(r"[^.].*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")
_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")
_TEMPORARY = ".writing"


def load_pretrained(
    model_class: type[Model],
    name_or_path: str | os.PathLike[str],
    *,
    config: InternViTConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | int | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    strict: bool = True,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    patch_resampling: str = "bicubic",
) -> Model:
    """A model with the weights of a checkpoint, in eval mode, in OpenGVLab's, transformers', timm's or mmseg's layout.

    Args:
        model_class: called with a configuration; its parameters have OpenGVLab's names.
        name_or_path: a folder, a `.safetensors`, `.pth` or `.bin` file, a name of `internvit.config.HUB_IDS`, or a
            hub id. Of a whole InternVL only the vision tower is read.
        config: the architecture; by default that of `config.json` beside the weights, or else `infer_config`'s.
        dtype: of the parameters; by default as stored.
        device: of the parameters; by default PyTorch's default device.
        revision, cache_dir, token, local_files_only: of the hub.
        strict: missing and unexpected keys are an error; otherwise they are logged, and what is missing keeps the
            model's own initial values. Wrong shapes are an error always.
        image_size: native (height, width) to resize the position embedding to; by default the checkpoint's.
        patch_size: to resample the patch embedding to, such as 16; without image_size the grid stays (448 -> 512).
        patch_resampling: "bicubic" (OpenGVLab's) or "pi" (timm's); see `resample.resample_patch_embedding`.

    Raises:
        ValueError: a broken file, pickled objects, weights that do not fit the configuration (the message lists them).
        FileNotFoundError: no such checkpoint, or one of its files is missing.
        OSError: the hub cannot be reached, or has no such repository.
        ImportError: a hub id without huggingface_hub.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
    path = locate(name_or_path, revision, cache_dir, token, local_files_only)
    checkpoint = Checkpoint(path)
    config = config or checkpoint.config()
    with naming(path):
        plan = conversion_plan(checkpoint.keys)
    shapes = checkpoint.shapes(plan.sources())
    with naming(path):
        found = target_shapes(plan, shapes)
        if config is None:
            config = infer_config(found)
            logger.warning(
                "%s: no config.json; from the weights, with head_dim taken to be %s: %s", path, config.head_dim, config
            )
    plan.log_set_aside(str(path))

    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    compare_shapes(found, expected, plan.unexpected, source=str(path), strict=strict)
    if any(name not in found for name in expected):
        model = model_class(config)  # its own initial values
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name not in found}
    where = torch.get_default_device() if device is None else device
    parameters = {name: tensor.to(device=where, dtype=dtype) for name, tensor in parameters.items()}
    parameters.update(_read_parameters(checkpoint, plan, found, expected, dtype, device))
    model.load_state_dict(parameters, assign=True)
    if image_size is not None or patch_size is not None:
        resize_embeddings(model, image_size, patch_size, patch_resampling)
    return model.eval()


def _read_parameters(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    found: Mapping[str, tuple[int, ...]],
    wanted: Iterable[str],
    dtype: torch.dtype | None,
    device: torch.device | str | int | None,
) -> dict[str, Tensor]:
    """Copies the wanted parameters out of the files, file by file in the order of the keys."""
    copies = [
        (checkpoint.file(checkpoint.keys[piece.key]), piece, name, index)
        for name in wanted
        if name in found
        for index, piece in enumerate(plan.targets[name])
    ]
    copies.sort(key=lambda copy: str(copy[0].path))
    total = sum(_numel(found[name]) // len(plan.targets[name]) for _, _, name, _ in copies)
    parameters: dict[str, Tensor] = {}
    # How many bytes of a file may be mapped and touched at once: a sixteenth of the checkpoint, 16 to 256 MiB.
    size = sum(path.stat().st_size for path in {file.path for file, *_ in copies})
    window, mapped = min(max(size // 16, 16 * 2**20), 256 * 2**20), 0
    with _progress(total, f"Loading {checkpoint.path.name}") as advance:
        for position, (file, piece, name, index) in enumerate(copies):
            stored = file.read(piece.key)
            if not stored.is_floating_point():
                raise ValueError(f"{file.path}: expected {piece.key} in floating point, got {stored.dtype}")
            if name not in parameters:
                parameters[name] = torch.empty(found[name], dtype=dtype or stored.dtype, device=device)
            elif dtype is None and parameters[name].dtype != stored.dtype:
                raise ValueError(f"{file.path}: expected {piece.key} in {parameters[name].dtype}, got {stored.dtype}")
            rows = len(stored)
            step = max(1, window // max(1, stored.nbytes // max(1, rows)))
            for start in range(0, rows, step):
                stored = file.read(piece.key)
                part = stored[start : start + step]
                offset = index * rows + start
                parameters[name][offset : offset + len(part)].copy_(part)
                mapped += part.nbytes
                advance(part.numel())
                del stored, part
                if mapped >= window:
                    file.give_back()
                    mapped = 0
            if position + 1 == len(copies) or copies[position + 1][0] is not file:
                file.give_back()
                mapped = 0
    return parameters


def _numel(shape: Iterable[int]) -> int:
    return int(torch.Size(shape).numel())


@contextmanager
def _progress(total: int, title: str) -> Iterator[Any]:
    """A bar on a terminal for what takes over three seconds, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, desc=title, unit=" parameters", unit_scale=True, delay=3, disable=None) as bar:
        yield bar.update


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    layout: str = "opengvlab",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
) -> Path:
    """Writes `config.json` and the weights, as `model.safetensors` or as shards with an index.

    A save that is interrupted leaves a whole checkpoint: the earlier one or the new one. (Only if the new one has
    another configuration can a crash between the last two renames leave its weights beside the earlier config.json.)

    Args:
        model: with a `config` and OpenGVLab's parameter names.
        folder: made if it is not there.
        layout: of the keys; with "transformers", `InternVLVisionModel.from_pretrained` reads the folder.
        max_shard_size: bytes, or a string such as "500MB" or "5GB".
        overwrite: replace weights that are there.

    Returns:
        The folder.

    Raises:
        ValueError: a layout that cannot hold this model, weights that are not those of its configuration or are on
            the meta device, a bad size.
        FileExistsError: weights are there and `overwrite` is False.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    limit = _bytes(max_shard_size)
    config = model.config
    if not isinstance(config, InternViTConfig):
        raise ValueError(f"model: expected its config to be an InternViTConfig, got {type(config).__name__}")
    tensors = convert_state_dict(model.state_dict(), layout, config=config)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("model: expected weights, got parameters on the meta device")
    fields = config.to_dict("transformers" if layout == "transformers" else "opengvlab")
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) == 1:
        fields["torch_dtype"] = dtypes.pop()

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    present = {entry.name for entry in folder.iterdir()}
    if not overwrite and any(_WEIGHTS.fullmatch(name) for name in present):
        raise FileExistsError(f"{folder}: holds weights; pass overwrite=True to replace them")
    stale = {name for name in present if _SHARD.fullmatch(name) or name.endswith(_TEMPORARY)}
    with suppress(ValueError, FileNotFoundError):  # no index, or a broken one
        stale |= set(read_index(folder / INDEX).values())

    shards = _shards(tensors, limit)
    names = _shard_names(len(shards), present)
    with _atomic(folder) as temporary:
        for name, shard in zip(names, shards, strict=True):
            save_file(_plain(tensors, shard), temporary(name), metadata={"format": "pt"})
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            _write_json(temporary(INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map})
        _write_json(temporary(CONFIG), fields)
    # Readers take model.safetensors before an index, and an index before its shards: remove in that order.
    stale_weights = [INDEX] if len(shards) == 1 else [WEIGHTS]
    for name in [*stale_weights, *sorted(stale - set(names))]:
        (folder / name).unlink(missing_ok=True)
    return folder


def _bytes(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B\s*", size.upper()) if isinstance(size, str) else None
    number = float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " ") if match else 0
    if number < 1:
        raise ValueError(f"max_shard_size: expected bytes or a string such as '5GB', got {size!r}")
    return int(number)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """The keys in order, in groups of at most `limit` bytes; a larger tensor is a group of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def _shard_names(count: int, present: set[str]) -> list[str]:
    """Names for the shards, none of them in use, so that the index that is there stays true until it is replaced."""
    if count == 1:
        return [WEIGHTS]
    for stem in ("model", *(f"model-{generation}" for generation in range(1, len(present) + 2))):
        names = [f"{stem}-{shard + 1:05d}-of-{count:05d}.safetensors" for shard in range(count)]
        if not present.intersection(names):
            break
    return names


def _plain(tensors: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory with another: what safetensors can write."""
    plain: dict[str, Tensor] = {}
    for key in keys:
        tensor = tensors[key].detach().to("cpu").contiguous()
        plain[key] = tensor if tensor.nbytes == tensor.untyped_storage().nbytes() else tensor.clone()
    owners = {tensor.data_ptr(): key for key, tensor in plain.items()}
    return {key: tensor if owners[tensor.data_ptr()] == key else tensor.clone() for key, tensor in plain.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _atomic(folder: Path) -> Iterator[Any]:
    """Gives temporary paths for names in the folder; at the end they take their names in the order they were given.

    All are on the disk before the first is renamed; after an error none is left.
    """
    written: dict[str, Path] = {}

    def temporary(name: str) -> Path:
        written[name] = folder / f".{name}.{os.getpid()}{_TEMPORARY}"
        return written[name]

    try:
        yield temporary
        for path in written.values():
            _flush(path)
        for name, path in written.items():
            os.replace(path, folder / name)
        _flush(folder)
    finally:
        for path in written.values():
            path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Has the system write a file, or a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
