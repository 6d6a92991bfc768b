"""Tensors of torch.save, from files that anybody may have made."""

import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvit.checkpoint.state_dict import unwrap

# Of the storages' names in a file; their classes warn at every use.
_ITEMSIZE = {
    **{"ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "DoubleStorage": 8, "LongStorage": 8},
    **{"FloatStorage": 4, "IntStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2},
}


def load_pickle(place: str, path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a file of torch.save, and whether they are mapped: files from before torch 1.6 cannot be.

    Args:
        place: where to open the file.
        path: what to call it.

    Raises:
        ValueError: pickled objects, a damaged file, or something else than tensors; the message names the file.
    """
    mapped = True
    try:
        try:
            loaded = torch.load(place, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            mapped = False
            loaded = torch.load(place, map_location="cpu", weights_only=True)
        if mapped:
            _check_records(place)
        tensors = unwrap(loaded)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds pickled objects other than tensors, and reading them could run code; or it is no file of "
            f"torch.save. If you trust it, load it yourself and save its tensors with safetensors.torch.save_file."
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # whatever the pickle's opcodes do with the wrong objects, and the archive's reader
        raise ValueError(f"{path}: not a whole file of torch.save: {type(error).__name__}: {error}") from error
    return tensors, mapped


def check_dense(key: str, tensor: Tensor) -> None:
    """Raises a ValueError for what is no dense tensor with memory of its own."""
    kind = None
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = f"a {'nested' if tensor.is_nested else str(tensor.layout).removeprefix('torch.')} tensor"
    elif tensor.is_quantized:
        kind = f"a quantized tensor ({tensor.dtype})"
    elif tensor.device.type != "cpu":
        kind = f"a tensor without data on {tensor.device.type}"
    elif tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        kind = f"{list(tensor.shape)} expanded from {tensor.untyped_storage().nbytes()} bytes"
    if kind:
        raise ValueError(f"state dict: expected dense tensors, got {kind} under {key}")


def _check_records(place: str) -> None:
    """Refuses an archive with a record shorter than its storage: torch reads on into what follows, without a word."""
    reader = torch._C.PyTorchFileReader(place)
    storages = _Storages(BytesIO(reader.get_record("data.pkl")))
    storages.load()
    for key, nbytes in storages.sizes.items():
        held = reader.get_record_size(f"data/{key}")
        if held < nbytes:
            raise ValueError(f"not a whole file of torch.save: expected {nbytes} bytes in data/{key}, got {held}")


class _Inert:
    """Stands for every object of a pickle; it takes what it is given and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def add(self, item: Any) -> None: ...


class _Storages(pickle.Unpickler):
    """Reads from a pickle of torch.save which storages it has and how long they are; nothing of it is run."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return type(name, (_Inert,), {})
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        _, storage, key, _, numel = pid
        itemsize = _ITEMSIZE.get(storage.__name__, 1)  # UntypedStorage counts bytes
        self.sizes[key] = max(self.sizes.get(key, 0), numel * itemsize)
        return _Inert()
