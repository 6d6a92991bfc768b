"""Reading and writing InternViT checkpoints, streamed, strict and atomic.

Reading: find the files -> plan the conversion from their keys -> compare every shape -> only then allocate and copy, a
few rows at a time. The files are mapped; mapped pages count as the process's memory until the mapping goes, so a file
is closed and opened again after each `_window` bytes.

Writing: every file goes to a temporary name, to the disk, and then to its own name; what makes the new weights current
comes after the weights, and what it replaces goes last.
"""

import json
import logging
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from internvit.config import HUB_IDS, InternViTConfig
from internvit.convert import (
    LAYOUTS,
    ConversionPlan,
    compare_shapes,
    conversion_plan,
    convert_state_dict,
    infer_config,
    target_shapes,
    unwrap,
)

logger = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# The order in which a folder's weights are looked for; `model.safetensors` before the index, as transformers does.
_WEIGHT_FILES = (
    WEIGHTS,
    INDEX,
    "*.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.bin",
    "*.pth",
    "*.pt",
)
_SHARD = re.compile(r"model(-\d+)?-\d{5}-of-\d{5}\.safetensors")
_TEMPORARY = ".writing"


class _TensorFile:
    """The tensors of one file, read through a mapping that can be given back and comes again by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None
        opened = self._open()
        if isinstance(opened, dict):
            self.shapes = {key: tuple(tensor.shape) for key, tensor in opened.items()}
        else:
            self.shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118

    def _open(self) -> Any:
        if self._opened is None:
            if not self.path.is_file():
                raise FileNotFoundError(f"{self.path}: no such file; the checkpoint is not complete")
            self._opened = _map_safetensors(self.path) if self.path.suffix == ".safetensors" else _map_pickle(self.path)
        return self._opened

    def read(self, key: str) -> Tensor:
        """The tensor as a view of the mapped file: it must be dropped before `give_back`."""
        opened = self._open()
        return opened[key] if isinstance(opened, dict) else opened.get_tensor(key)

    def give_back(self) -> None:
        self._opened = None


def _map_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _map_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save; those of before torch 1.6 cannot be mapped and are read at once."""
    try:
        try:
            return unwrap(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return unwrap(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds pickled objects other than tensors, and reading them could run code. If you trust the "
            f"file, load it yourself, save its tensors with safetensors.torch.save_file and load that."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a whole file of torch.save: {error}") from error


class _Checkpoint:
    """Where the tensors and the configuration of a file or a folder are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self._files: dict[str, _TensorFile] = {}
        weights = _find_weights(path) if path.is_dir() else path
        if weights.name.endswith(".index.json"):
            names = _read_index(weights)
        else:
            names = dict.fromkeys(self.file(weights.name).shapes, weights.name)
        self.keys: Mapping[str, str] = names  # key -> file name

    def file(self, name: str) -> _TensorFile:
        if name not in self._files:
            self._files[name] = _TensorFile(self.folder / name)
        return self._files[name]

    def shapes(self, keys: Iterable[str]) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for key in keys:
            file = self.file(self.keys[key])
            if key not in file.shapes:
                raise ValueError(f"{file.path}: expected to hold {key}, as the index says, but it does not")
            shapes[key] = file.shapes[key]
        return shapes

    def config(self) -> InternViTConfig | None:
        path = self.folder / CONFIG
        return InternViTConfig.from_json(path) if path.is_file() else None


def _find_weights(folder: Path) -> Path:
    for pattern in _WEIGHT_FILES:
        found = sorted(p for p in folder.glob(pattern) if not p.name.startswith(".") and p.name != "training_args.bin")
        if len(found) > 1:
            raise ValueError(
                f"{folder}: expected one file of weights or an index of them, got {', '.join(p.name for p in found)}"
            )
        if found:
            return found[0]
    raise FileNotFoundError(f"{folder}: holds no weights; looked for {', '.join(_WEIGHT_FILES)}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards: {error!r}") from error
    bad = [str(name) for name in names.values() if not isinstance(name, str) or Path(name).name != name]
    if bad:
        raise ValueError(f"{path}: expected file names of its own folder, got {bad[0]!r}")
    return names


def _locate(
    name_or_path: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
    token: str | bool | None,
    local_files_only: bool,
) -> Path:
    """A local path as it is; a registry name or a hub id as the folder of the downloaded files."""
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    repository = HUB_IDS.get(str(name_or_path), str(name_or_path))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or path.suffix in (".safetensors", ".pth", ".bin", ".pt"):
        raise FileNotFoundError(
            f"name_or_path: {str(name_or_path)!r} is no file or folder, no hub id (owner/name) and none of the names "
            f"{', '.join(HUB_IDS)}"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ImportError(
            f"{repository} is to come from the hub: pip install 'internvit[hub]', or give a local folder"
        ) from error

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
            )
        )

    try:
        folder = fetch(CONFIG, "*.index.json")
        if (folder / INDEX).is_file():  # of a whole InternVL, only the shards that hold the vision tower
            keys = _read_index(folder / INDEX)
            plan = conversion_plan(keys)
            return fetch(CONFIG, INDEX, *sorted({keys[key] for key in _sources(plan)}))
        folder = fetch(CONFIG, "*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else fetch(CONFIG, "*.bin", "*.bin.index.json", "*.pth")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OSError(
            f"{repository} could not be fetched from the hub ({type(error).__name__}: {error}); check the name, the "
            f"network and the token, or download it elsewhere and give the folder"
        ) from error


def _sources(plan: ConversionPlan) -> list[str]:
    return [piece.key for pieces in plan.targets.values() for piece in pieces]


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

    Raises:
        ValueError: a broken file, pickled objects, weights that do not fit the configuration (the message lists them).
        FileNotFoundError: no such checkpoint, or one of its files is missing.
        OSError: the hub cannot be reached, or has no such repository.
        ImportError: a hub id without huggingface_hub.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: expected a floating-point torch.dtype or None, got {dtype!r}")
    path = _locate(name_or_path, revision, cache_dir, token, local_files_only)
    checkpoint = _Checkpoint(path)
    try:
        plan = conversion_plan(checkpoint.keys)
        shapes = checkpoint.shapes(_sources(plan))
        found = target_shapes(plan, shapes)
        config = config or checkpoint.config()
        if config is None:
            config = infer_config(found)
            heads = config.num_attention_heads
            logger.warning("%s: no config.json; inferred from the weights, with %s heads: %s", path, heads, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    plan.log_set_aside(str(path))

    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    compare_shapes(found, expected, plan.unexpected, source=str(path), strict=strict)
    if any(name not in found for name in expected):
        model = model_class(config)  # its own initial values
    parameters = {name: tensor for name, tensor in model.state_dict().items() if name not in found}
    for name, tensor in parameters.items():
        parameters[name] = tensor.to(device=device or torch.get_default_device(), dtype=dtype)
    parameters.update(_read_parameters(checkpoint, plan, found, expected, dtype, device))
    model.load_state_dict(parameters, assign=True)
    return model.eval()


def _read_parameters(
    checkpoint: _Checkpoint,
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
    window, mapped = _window(checkpoint), 0
    with _progress(total, f"Loading {checkpoint.path.name}") as advance:
        for position, (file, piece, name, index) in enumerate(copies):
            stored = file.read(piece.key)
            if not stored.is_floating_point():
                raise ValueError(f"{file.path}: expected {piece.key} in floating point, got {stored.dtype}")
            if name not in parameters:
                parameters[name] = torch.empty(found[name], dtype=dtype or stored.dtype, device=device)
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


def _window(checkpoint: _Checkpoint) -> int:
    """How many bytes of a file may be mapped and touched at once: a sixteenth of the checkpoint, 16 to 256 MiB."""
    size = sum((checkpoint.folder / name).stat().st_size for name in set(checkpoint.keys.values()))
    return min(max(size // 16, 16 * 2**20), 256 * 2**20)


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
) -> None:
    """Writes `config.json` and the weights, as `model.safetensors` or as shards with an index.

    A save that is interrupted leaves an earlier checkpoint in the folder as it was, and loadable.

    Args:
        model: with a `config` and OpenGVLab's parameter names.
        folder: made if it is not there.
        layout: of the keys; with "transformers", `InternVLVisionModel.from_pretrained` reads the folder.
        max_shard_size: bytes, or a string such as "500MB" or "5GB".
        overwrite: replace weights that are there.

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
    if not overwrite and any(name == INDEX or name.endswith((".safetensors", ".bin", ".pth")) for name in present):
        raise FileExistsError(f"{folder}: holds weights; pass overwrite=True to replace them")
    stale = {name for name in present if _SHARD.fullmatch(name) or name.endswith(_TEMPORARY)}
    if INDEX in present:
        stale |= set(_read_index(folder / INDEX).values())

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
