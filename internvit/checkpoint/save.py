"""Writing InternViT checkpoints: whole or not at all, by one process at a time.

Every file goes to a temporary name, to the disk, and then to its own name; what makes the new weights current comes
after the weights, and what it replaces goes last. The folder is locked for that moment.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from internvit.checkpoint.files import CONFIG, INDEX, WEIGHTS, read_index
from internvit.checkpoint.quantized import SUFFIX, is_scale
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.checkpoint.tower import find_tower
from internvit.config import InternViTConfig
from internvit.files import Staging, locked, read_json, staging
from internvit.names import LAYOUTS, listed, match

_WEIGHTS = re.compile(r"[^.].*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")
_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")
_STAGED = ".shard"
_NOT_READ = ("name", "drop_path_rate", "initializer_factor", "initializer_range")  # change nothing about features


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
    Of several processes that save at once, each writes a whole checkpoint, and the last one's stays.

    Args:
        model: with a `config` and OpenGVLab's parameter names.
        folder: made if it is not there.
        layout: of the keys. "opengvlab" is read by `InternVisionModel`, "transformers" by `InternVLVisionModel`,
            "timm" by `timm.create_model("local-dir:FOLDER")`; config.json is in the same upstream's spelling.
        max_shard_size: bytes, or a string such as "500MB" or "5GB".
        overwrite: replace an InternViT that is there; other files stay.

    Returns:
        The folder.

    Raises:
        ValueError: a layout that cannot hold this model, weights that are not those of its configuration, are
            quantised, sharded or on the meta device, a bad size.
        FileExistsError: weights, or a config.json of other settings, are there and `overwrite` is False; or the
            weights hold more than an InternViT, such as the rest of an InternVL.
        OSError: the disk is full, or the folder cannot be written.
    """
    tensors, fields = contents(model, layout)
    return write_checkpoint(tensors, fields, folder, max_shard_size, overwrite)


def write_checkpoint(
    tensors: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    folder: str | os.PathLike[str],
    max_shard_size: int | str,
    overwrite: bool,
) -> Path:
    """Writes the tensors and config.json's fields; all else as `save_pretrained`."""
    limit = _bytes(max_shard_size)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_to_replace(folder, overwrite, fields)
    shards = _shards(tensors, limit)
    with staging(folder, "checkpoint") as stage:
        for number, shard in enumerate(shards):
            _write_shard(stage.path(f"{number}{_STAGED}"), _plain(tensors, shard))
        stage.flush()
        with locked(folder):
            refuse_to_replace(folder, overwrite, fields)  # another process may have saved meanwhile
            _publish(stage, folder, tensors, shards, fields)
    return folder


def contents(model: nn.Module, layout: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and config.json's fields to write."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    config = getattr(model, "config", None)
    if not isinstance(config, InternViTConfig):
        raise ValueError(f"model: expected its config to be an InternViTConfig, got {type(config).__name__}")
    state = model.state_dict()
    for name, tensor in state.items():
        _refuse_unplain(name, tensor)
    tensors = convert_state_dict(state, layout, config=config)
    fields = config.to_dict(layout)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    if len(dtypes) == 1:
        fields["torch_dtype"] = dtypes.pop()
    return tensors, fields


def _refuse_unplain(name: str, tensor: Any) -> None:
    """A tensor that safetensors cannot hold, or that would be no plain weight when it is read."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.itemsize == 1:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(
            f"model: expected weights in floating point, got {got} in {name}: save it before quantising it"
        )
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(
            f"model: expected plain tensors, got {type(tensor).__name__} in {name}: save it before quantising it; "
            f"gather what is sharded (full_tensor())"
        )
    if tensor.is_meta:
        raise ValueError("model: expected weights, got parameters on the meta device")


def refuse_to_replace(folder: Path, overwrite: bool, fields: Mapping[str, Any] | None = None) -> None:
    """Raises FileExistsError where a save into the folder, of config.json's `fields`, would lose something."""
    present = [entry.name for entry in folder.iterdir()]
    if not overwrite and any(_WEIGHTS.fullmatch(name) for name in present):
        raise FileExistsError(f"{folder}: holds weights; pass overwrite=True to replace them")
    for name, keys in ((WEIGHTS, _keys_of(folder / WEIGHTS)), (INDEX, _keys_of_index(folder / INDEX))):
        if not keys:
            continue
        try:
            tower = find_tower(keys)
            others = [key for key in (*tower.set_aside, *tower.unexpected) if not is_scale(key)]
        except ValueError:  # no InternViT, or several
            others = keys
        if others:
            raise FileExistsError(
                f"{folder}: {name} holds more than an InternViT, which would be lost: {listed(others)}; "
                f"save to another folder"
            )
    if _is_of_another_model(folder / CONFIG):
        raise FileExistsError(f"{folder}: {CONFIG} is that of another model; save to another folder")
    if fields is not None and not overwrite and (differing := _differing_fields(folder / CONFIG, fields)):
        # Weights of any name beside it, as a .pth, would be read with the new one.
        raise FileExistsError(
            f"{folder}: {CONFIG} has another {listed(differing)}; pass overwrite=True to replace it, or save to "
            f"another folder"
        )


def _differing_fields(path: Path, fields: Mapping[str, Any]) -> list[str]:
    """The settings by which weights are read where a config.json differs from `fields`; none if it is broken."""
    try:
        present = InternViTConfig.from_dict(read_json(path)).to_dict()
    except (ValueError, OSError):
        return []
    new = InternViTConfig.from_dict(fields).to_dict()
    return [name for name in new if name not in _NOT_READ and present.get(name) != new[name]]


def _is_of_another_model(path: Path) -> bool:
    """Whether a config.json describes more than an InternViT, or something else; not if it is broken."""
    try:
        fields = read_json(path)
    except (ValueError, OSError):
        return False
    if not isinstance(fields, dict):
        return False
    if fields.get("vision_config") is not None:
        return True
    try:
        InternViTConfig.from_dict(fields)
    except ValueError:
        return True
    return False


def _keys_of(path: Path) -> list[str]:
    """The keys of a safetensors file; none if there is none, or a broken one."""
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError):
        return []


def _keys_of_index(path: Path) -> list[str]:
    """The keys of an index, whatever it calls their files; none if there is none, or a broken one."""
    with suppress(ValueError, OSError):
        index = read_json(path)
        names = index.get("weight_map") if isinstance(index, dict) else None
        return list(names) if isinstance(names, dict) else []
    return []


def _publish(
    stage: Staging, folder: Path, tensors: Mapping[str, Tensor], shards: list[list[str]], fields: Mapping[str, Any]
) -> None:
    """Gives what is staged its names, and removes what it replaces; under the folder's lock."""
    present = {entry.name for entry in folder.iterdir()}
    names = _shard_names(len(shards), present)
    stale = _replaced_shards(folder, present)
    staged = {f"{number}{_STAGED}": name for number, name in enumerate(names)}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        _write_json(stage.path(INDEX), {"metadata": {"total_size": total}, "weight_map": weight_map})
        staged[INDEX] = INDEX
    _write_json(stage.path(CONFIG), fields)
    stage.flush()
    stage.publish({**staged, CONFIG: CONFIG})
    # Readers take model.safetensors before an index, and an index before its shards: remove in that order.
    stale_weights = [INDEX] if len(shards) == 1 else [WEIGHTS]
    for name in [*stale_weights, *sorted(stale - set(names))]:
        (folder / name).unlink(missing_ok=True)


def _replaced_shards(folder: Path, present: set[str]) -> set[str]:
    """The shards of the InternViT that is there, and those that an interrupted save has left; of our names alone."""
    indexed: set[str] = set()
    with suppress(ValueError, FileNotFoundError):  # no index, or a broken one
        indexed = set(read_index(folder / INDEX).values())
    return {name for name in present if _SHARD.fullmatch(name) and (name in indexed or _is_ours(folder / name))}


def _is_ours(path: Path) -> bool:
    """Whether every tensor of a shard is an InternViT's, as this module writes it: without a prefix."""
    meanings = [match(key.removesuffix(SUFFIX) if is_scale(key) else key) for key in _keys_of(path)]
    return bool(meanings) and all(meaning and not meaning.prefix for meaning in meanings)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its name for a full disk
        raise OSError(f"{path.parents[2]}: could not be written: {error}") from error


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
