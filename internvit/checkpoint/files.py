"""The files of a checkpoint and the tensors in them.

A file is opened once and held: what is read comes from the file that was there at the start, whatever takes its name
meanwhile. Tensors of safetensors are copied out of it, not mapped: a mapped file that somebody truncates ends its
readers by SIGBUS. Those of torch.save are mapped by torch.load; mapped pages count as the process's memory until the
mapping goes, so a mapping can be given back, and comes again by itself.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from internvit.checkpoint.pickles import check_dense, load_pickle
from internvit.checkpoint.state_dict import conversion_plan
from internvit.config import InternViTConfig
from internvit.files import locked, read_json

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
# Not its types of 4 and 6 bits, which are no torch dtypes.
_DTYPES = {
    **{"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16},
    **{"U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "C64": torch.complex64},
    **{"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the path before the message of a ValueError from inside."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Stored(NamedTuple):
    """A tensor of safetensors: its dtype's name there, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


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
        self._mapping: dict[str, Tensor] | None = None
        self._can_unmap = True
        self._stored: dict[str, _Stored] = {}
        try:
            if path.suffix == ".safetensors":
                self._read_header()
                self.shapes = {key: stored.shape for key, stored in self._stored.items()}
            else:  # a nested tensor has no shape
                self.shapes = {key: () if t.is_nested else tuple(t.shape) for key, t in self._map().items()}
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

    def _map(self) -> dict[str, Tensor]:
        if self._mapping is None:
            self._mapping, self._can_unmap = load_pickle(self._place(), self.path)
        return self._mapping

    def _read_header(self) -> None:
        """Where each tensor lies. The checks of the header are safetensors' own, and that no key is there twice."""
        try:
            with safe_open(self._place(), framework="pt", device="cpu"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{self.path}: not a whole safetensors file: {error}") from error
        length = int.from_bytes(self._file.read(8), "little")
        with naming(self.path):
            header = json.loads(self._file.read(length), object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        for key, entry in header.items():
            begin, end = entry["data_offsets"]
            self._stored[key] = _Stored(entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)

    def dtype(self, key: str) -> torch.dtype:
        """The dtype of a tensor.

        Raises:
            ValueError: a type of less than a byte, or a tensor that is not dense.
        """
        if key in self._stored:
            name = self._stored[key].dtype
            if name not in _DTYPES:
                raise ValueError(f"{self.path}: expected {key} in floating point of 16 to 64 bits, got {name}")
            return _DTYPES[name]
        tensor = self._map()[key]
        with naming(self.path):
            check_dense(key, tensor)
        return tensor.dtype

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows `start` to `stop` of a tensor; of a mapped file a view, which must be dropped before `unmap`.

        Raises:
            ValueError: as for `dtype`, or the file ends before the tensor does.
        """
        dtype = self.dtype(key)
        if key not in self._stored:
            return self._map()[key][start:stop]
        _, shape, offset, nbytes = self._stored[key]
        rows = shape[0] if shape else 1
        row_bytes = nbytes // max(1, rows)
        stop = rows if stop is None else min(stop, rows)
        part = torch.empty((stop - start, *shape[1:]), dtype=dtype, device="cpu")
        if part.nbytes != (stop - start) * row_bytes:
            raise ValueError(f"{self.path}: expected {list(shape)} of {dtype} under {key}, got {nbytes} bytes")
        if part.nbytes:
            self._file.seek(offset + start * row_bytes)
            memory: Any = part.view(-1).view(torch.uint8).numpy()
            if self._file.readinto(memory) != part.nbytes:
                raise ValueError(f"{self.path}: was cut short while it was read: it ends inside {key}; load it again")
        return part

    def unmap(self) -> None:
        if self._can_unmap:
            self._mapping = None

    def check_unchanged(self) -> None:
        """Raises a ValueError if somebody has written into the file since it was opened."""
        if self._stat() != self._version:
            raise ValueError(f"{self.path}: was written to while it was read; load it again")

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


def read_tensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The tensors whose keys are wanted, of a folder, a file of weights, or an index of shards.

    Raises:
        FileNotFoundError: no such file, or no weights in the folder.
        ValueError: a broken file, several files of weights without an index, or one that is written to meanwhile.
    """
    path = _find_weights(path) if path.is_dir() else path
    index = read_index(path) if path.name.endswith(".index.json") else None
    names = [path.name] if index is None else sorted({name for key, name in index.items() if wanted(key)})
    tensors: dict[str, Tensor] = {}
    for name in names:
        with closing(TensorFile(path.parent / name)) as file:
            keys = [key for key in file.shapes if wanted(key) and (index is None or index.get(key) == name)]
            tensors.update((key, file.read(key)) for key in keys)
            file.check_unchanged()
    return tensors


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
