"""Where a checkpoint's tensors are: finding its files, on disk or on the hub, and mapping them."""

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internvit.config import HUB_IDS, InternViTConfig
from internvit.upstream.state_dict import conversion_plan, unwrap

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


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path before the message of a ValueError from inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class TensorFile:
    """The tensors of one file, read through a mapping that can be given back and comes again by itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened: Any = None
        self._mapped = True
        opened = self._open()
        if isinstance(opened, dict):
            self.shapes = {key: tuple(tensor.shape) for key, tensor in opened.items()}
        else:
            self.shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118

    def _open(self) -> Any:
        if self._opened is None:
            if not self.path.is_file():
                raise FileNotFoundError(f"{self.path}: no such file; the checkpoint is not complete")
            if self.path.suffix == ".safetensors":
                self._opened = _map_safetensors(self.path)
            else:
                self._opened, self._mapped = _map_pickle(self.path)
        return self._opened

    def read(self, key: str) -> Tensor:
        """The tensor as a view of the mapped file: it must be dropped before `give_back`."""
        with torch.device("cpu"):  # whatever the caller's default device is
            opened = self._open()
            return opened[key] if isinstance(opened, dict) else opened.get_tensor(key)

    def give_back(self) -> None:
        if self._mapped:
            self._opened = None


def _map_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error


def _map_pickle(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file of torch.save, and whether they are mapped: files from before torch 1.6 cannot be."""
    mapped = True
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            mapped = False
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds pickled objects other than tensors, and reading them could run code; or it is no file of "
            f"torch.save. If you trust it, load it yourself and save its tensors with safetensors.torch.save_file."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path}: not a whole file of torch.save: {error}") from error
    with naming(path):
        return unwrap(loaded), mapped


class Checkpoint:
    """Where the tensors and the configuration of a file or a folder are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path if path.is_dir() else path.parent
        self._files: dict[str, TensorFile] = {}
        weights = _find_weights(path) if path.is_dir() else path
        if weights.name.endswith(".index.json"):
            names = read_index(weights)
        else:
            names = dict.fromkeys(self.file(weights.name).shapes, weights.name)
        self.keys: Mapping[str, str] = names  # key -> file name

    def file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
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


def read_index(path: Path) -> dict[str, str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards: {error!r}") from error
    bad = [str(name) for name in names.values() if not isinstance(name, str) or Path(name).name != name]
    if bad:
        raise ValueError(f"{path}: expected file names of its own folder, got {bad[0]!r}")
    return names


def locate(
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
            keys = read_index(folder / INDEX)
            plan = conversion_plan(keys)
            return fetch(CONFIG, INDEX, *sorted({keys[key] for key in plan.sources()}))
        folder = fetch(CONFIG, "*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else fetch(CONFIG, "*.bin", "*.bin.index.json", "*.pth")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OSError(
            f"{repository} could not be fetched from the hub ({type(error).__name__}: {error}); check the name, the "
            f"network and the token, or download it elsewhere and give the folder"
        ) from error
