"""The files of a checkpoint and the tensors in them.

A file is opened once and held: what is read comes from the file that was there at the start, whatever takes its name
meanwhile. Tensors are copied out of it, not mapped: a mapped file that somebody truncates ends its readers by SIGBUS.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internvit.checkpoint.pickles import check_dense, load_pickle
from internvit.config import InternViTConfig
from internvit.files import locked, read_json
from internvit.upstream.state_dict import conversion_plan

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
# safetensors 0.8 gives tensors of its 4-bit and 6-bit types memory that it does not fill.
_WHOLE_BYTES = frozenset(
    ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64", "C64")
) | frozenset(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path before the message of a ValueError from inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class TensorFile:
    """The tensors of one file of safetensors or torch.save.

    Attributes:
        path: of the file when it was opened.
        nbytes: of the file.
        shapes: of its tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file; the checkpoint is not complete")
        if not path.is_file():
            raise ValueError(f"{path}: expected a regular file")
        self._file = open(path, "rb")  # noqa: SIM115 (closed by `close`)
        self._version = self._stat()
        self.nbytes = self._version[0]
        self._mapping: Any = None
        self._can_unmap = True
        try:
            opened = self._map()
            if isinstance(opened, dict):  # a nested tensor has no shape
                self.shapes = {key: () if t.is_nested else tuple(t.shape) for key, t in opened.items()}
            else:
                self._check_header()
                self.shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except BaseException:
            self.close()
            raise

    def _stat(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def _place(self) -> str:
        """A path to the file that is held, whatever its own path names by now."""
        place = f"/proc/self/fd/{self._file.fileno()}"
        if os.path.exists(place):
            return place
        if not self.path.exists() or not os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
            raise ValueError(f"{self.path}: was replaced while it was read; load it again")
        return str(self.path)

    def _map(self) -> Any:
        if self._mapping is None:
            if self.path.suffix == ".safetensors":
                self._mapping = self._map_safetensors()
            else:
                self._mapping, self._can_unmap = load_pickle(self._place(), self.path)
        return self._mapping

    def _map_safetensors(self) -> Any:
        try:
            return safe_open(self._place(), framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{self.path}: not a whole safetensors file: {error}") from error

    def _check_header(self) -> None:
        """Refuses a key that is there twice, of which safetensors takes the last."""
        header = self._file.read(int.from_bytes(self._file.read(8), "little"))
        with naming(self.path):
            json.loads(header, object_pairs_hook=_unique)

    def read(self, key: str) -> Tensor:
        """The tensor as a view of the mapped file: it must be dropped before `unmap`.

        Raises:
            ValueError: a type of less than a byte, or a tensor that is not dense.
        """
        with torch.device("cpu"):  # whatever the caller's default device is
            opened = self._map()
            if isinstance(opened, dict):
                with naming(self.path):
                    check_dense(key, opened[key])
                return opened[key]
            dtype = opened.get_slice(key).get_dtype()
            if dtype not in _WHOLE_BYTES:
                raise ValueError(f"{self.path}: expected {key} in floating point of 16 to 64 bits, got {dtype}")
            return opened.get_tensor(key)

    def check_unchanged(self) -> None:
        """Raises a ValueError if somebody has written into the file since it was opened."""
        if self._stat() != self._version:
            raise ValueError(f"{self.path}: was written to while it was read; load it again")

    def unmap(self) -> None:
        if self._can_unmap:
            self._mapping = None

    def close(self) -> None:
        self._mapping = None
        self._file.close()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"expected every key once, got {next(k for k in keys if keys.count(k) > 1)} twice")
    return mapping


class Checkpoint:
    """The tensors of an InternViT in a file or a folder, how to read them, and their configuration.

    Args:
        path: a folder, a file of weights, an index of shards, or a folder's config.json.
        prefix: which InternViT is meant, where there are several.
        with_config: read config.json.

    Attributes:
        path: of the folder or the file of weights.
        keys: of all tensors, with the names of their files.
        plan: how they become OpenGVLab's parameters.
        config: that of config.json; None without one.
    """

    def __init__(self, path: Path, prefix: str | None = None, with_config: bool = True) -> None:
        self.path = path = path.parent if path.name == CONFIG else path
        self.folder = path if path.is_dir() else path.parent
        self._prefix, self._with_config = prefix, with_config
        self._files: dict[str, TensorFile] = {}
        # One of this library's writers is kept out by the lock. Another is noticed if it replaces an index, and leaves
        # the files alone that are held.
        with ExitStack() as stack:
            stack.callback(self.close)
            with locked(self.folder, shared=True):
                for _ in range(10):
                    if self._open(_find_weights(path) if path.is_dir() else path):
                        break
                    self.close()
                else:
                    raise ValueError(f"{path}: was replaced while it was read; load it again")
            stack.pop_all()

    def _open(self, weights: Path) -> bool:
        """Opens all that holds the tower; False if the index has been replaced meanwhile."""
        self.config = None
        path = self.folder / CONFIG
        if self._with_config and path.exists():
            self.config = InternViTConfig.from_json(path)
        version = None
        if weights.name.endswith(".index.json"):
            version = _version(weights)
            self.keys: Mapping[str, str] = read_index(weights)
        else:
            self.keys = dict.fromkeys(self.file(weights.name).shapes, weights.name)
        with naming(self.path):
            self.plan = conversion_plan(self.keys, prefix=self._prefix)
        try:
            for name in dict.fromkeys(self.keys[key] for key in self.plan.sources()):
                self.file(name)
        except FileNotFoundError:
            if version is None or version == _version(weights):
                raise
        return version is None or version == _version(weights)

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

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _version(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _find_weights(folder: Path) -> Path:
    for pattern in _WEIGHT_FILES:
        paths = sorted(p for p in folder.glob(pattern) if not p.name.startswith(".") and p.name != "training_args.bin")
        if len(paths) > 1:
            raise ValueError(
                f"{folder}: expected one file of weights or an index of them, got {', '.join(p.name for p in paths)}"
            )
        if paths:
            return paths[0]
    raise FileNotFoundError(f"{folder}: holds no weights; looked for {', '.join(_WEIGHT_FILES)}")


def read_index(path: Path) -> dict[str, str]:
    """The file of each key, as an index of shards names them.

    Raises:
        ValueError: something else, or names that are not plain ones of its own folder; the message names the file.
    """
    try:
        index = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: not an index of shards: {error}") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(names, dict):
        got = type(index).__name__ if not isinstance(index, dict) else f"a weight_map of type {type(names).__name__}"
        raise ValueError(f"{path}: not an index of shards: expected a mapping weight_map of names, got {got}")
    for name in names.values():
        # The hub would take * and ? for patterns, and fetch every file.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:*?[]\0"):
            raise ValueError(f"{path}: expected file names of its own folder, got {name!r}")
    return names
