"""The files of a folder of features: a shard's rows as Parquet or safetensors, and the images that failed.

    run.json                          the settings; their digest is the fingerprint
    plan/00000.parquet                which shard has which images
    data/00000000.parquet             path, height, width, tiles, features, model, fingerprint
    data/00000000.safetensors         or "PATH:features" of each image
    failures/00000000.parquet         path, error; of shards with failed images

A file appears under its name when it is whole. A shard's file of failures is written first: its data file says that the
shard is done.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from internvit.data import storage
from internvit.images import printable

FORMATS = ("parquet", "safetensors")
_FINGERPRINT = b"internvit.fingerprint"


class Row(NamedTuple):
    """An image's features; `size` is that of the pixels which the tower got."""

    path: str
    size: tuple[int, int]
    tiles: int
    features: dict[str, np.ndarray]


def arrow_type(shape: Sequence[int | None], dtype: str) -> Any:
    """Nested lists, of a fixed size where the shape has one."""
    import pyarrow as pa

    result = pa.float16() if dtype == "float16" else pa.float32()
    for side in reversed(shape):
        result = pa.list_(result) if side is None else pa.list_(result, side)
    return result


def _nested(values: np.ndarray, shape: Sequence[int | None]) -> Any:
    """Arrays [n, ...] of one shape as an arrow array of n lists, without a copy."""
    import pyarrow as pa

    result = pa.array(np.ascontiguousarray(values).reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        length = values.shape[axis]
        if shape[axis - 1] is None:
            count = int(np.prod(values.shape[:axis]))
            result = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * length), result)
        else:
            result = pa.FixedSizeListArray.from_arrays(result, length)
    return result


def arrow_column(rows: Sequence[np.ndarray | None], shape: Sequence[int | None], dtype: str) -> Any:
    """An arrow array of the rows' features, null for None."""
    import pyarrow as pa

    kind = arrow_type(shape, dtype)
    there = [row for row in rows if row is not None]
    if there and len(there) == len(rows) and None not in shape:
        return _nested(np.stack(there), shape)
    pieces = [pa.nulls(1, kind) if row is None else _nested(row[None], shape) for row in rows]
    return pa.concat_arrays(pieces) if pieces else pa.nulls(0, kind)


def arrow_columns(
    rows: Sequence[dict[str, np.ndarray] | None], names: Sequence[str], shape: Sequence[int | None], dtype: str
) -> dict[str, Any]:
    """`arrow_column` for each of the named features."""
    storage.import_pyarrow()
    return {name: arrow_column([None if r is None else r[name] for r in rows], shape, dtype) for name in names}


class ShardFiles(NamedTuple):
    """The output folder of an extraction.

    Attributes:
        folder: path or URL.
        format: "parquet" or "safetensors".
        names, shape, dtype: of the features.
        model, fingerprint: of the run, in every file.
    """

    folder: str
    format: str
    names: tuple[str, ...]
    shape: tuple[int | None, ...]
    dtype: str
    model: str
    fingerprint: str

    def data(self, index: int) -> str:
        return storage.join(self.folder, "data", f"{index:08d}.{self.format}")

    def failures(self, index: int) -> str:
        return storage.join(self.folder, "failures", f"{index:08d}.parquet")

    def write(self, index: int, rows: Sequence[Row], failed: Sequence[tuple[str, str]]) -> None:
        """Writes a shard; with its data file it is done."""
        if failed:
            storage.write_atomically(self.failures(index), self._failures(failed))
        else:
            storage.remove(self.failures(index))  # of an attempt that could read less
        serialize = self._parquet if self.format == "parquet" else self._safetensors
        storage.write_atomically(self.data(index), serialize(rows))

    def is_done(self, index: int) -> bool:
        """Whether the shard's data file is there, whole, and of this run.

        Raises:
            ValueError: it is another run's.
        """
        place = self.data(index)
        if storage.stat(place) is None:
            return False
        fingerprint = _parquet_fingerprint(place) if self.format == "parquet" else _safetensors_fingerprint(place)
        if fingerprint not in (None, self.fingerprint):
            raise ValueError(f"{printable(place)}: of a run with other settings: {fingerprint}, not {self.fingerprint}")
        return fingerprint is not None

    def failed(self, index: int) -> int:
        """How many images of a shard that is done failed."""
        from pyarrow import parquet

        place = self.failures(index)
        if storage.stat(place) is None:
            return 0
        with storage.open_file(place) as file:
            return parquet.ParquetFile(file).metadata.num_rows

    def failed_paths(self, index: int) -> set[str]:
        """The images of a shard that failed, as they are printed."""
        from pyarrow import parquet

        place = self.failures(index)
        if storage.stat(place) is None:
            return set()
        with storage.open_file(place) as file:
            return set(parquet.read_table(file, columns=["path"])["path"].to_pylist())

    def _parquet(self, rows: Sequence[Row]) -> Any:
        import pyarrow as pa

        columns: dict[str, Any] = {
            "path": pa.array([row.path for row in rows], pa.string()),
            "height": pa.array([row.size[0] for row in rows], pa.int32()),
            "width": pa.array([row.size[1] for row in rows], pa.int32()),
            "tiles": pa.array([row.tiles for row in rows], pa.int32()),
            **arrow_columns([row.features for row in rows], self.names, self.shape, self.dtype),
            **{name: _constant(getattr(self, name), len(rows)) for name in ("model", "fingerprint")},
        }
        return self._serialize(pa.table(columns))

    def _failures(self, failed: Sequence[tuple[str, str]]) -> Any:
        import pyarrow as pa

        paths, errors = zip(*failed, strict=True)
        return self._serialize(pa.table({"path": pa.array(paths, pa.string()), "error": pa.array(errors, pa.string())}))

    def _serialize(self, table: Any) -> Any:
        import pyarrow as pa
        from pyarrow import parquet

        table = table.replace_schema_metadata({_FINGERPRINT: self.fingerprint.encode()})
        sink = pa.BufferOutputStream()
        # Features take neither dictionaries nor statistics, and zstd finds 7 % in them.
        others = [name for name in table.column_names if name not in self.names]
        compression = dict.fromkeys(others, "zstd")
        parquet.write_table(table, sink, use_dictionary=others, write_statistics=others, compression=compression)
        return sink.getvalue()

    def _safetensors(self, rows: Sequence[Row]) -> bytes:
        from safetensors.numpy import save

        tensors = {
            f"{row.path}:{name}": np.ascontiguousarray(row.features[name]) for row in rows for name in self.names
        }
        # One entry: several would come in another order each time.
        return save(tensors, {"internvit": json.dumps({"model": self.model, "fingerprint": self.fingerprint})})


def _constant(value: str, count: int) -> Any:
    import pyarrow as pa

    return pa.array([value] * count, pa.string())


def _parquet_fingerprint(place: str) -> str | None:
    """None of a file that is not whole: Parquet's metadata are at its end."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with storage.open_file(place) as file:
            metadata = parquet.ParquetFile(file).schema_arrow.metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    return metadata.get(_FINGERPRINT, b"nothing").decode()


def _safetensors_fingerprint(place: str) -> str | None:
    """None of a file that is not whole: the header says how long it is."""
    entry = storage.stat(place)
    try:
        with storage.open_file(place) as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, entry.size if entry else 0)))
        fingerprint = json.loads(header.pop("__metadata__", {}).get("internvit", "{}")).get("fingerprint", "nothing")
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (ValueError, KeyError, AttributeError, TypeError, OSError):
        return None
    return fingerprint if entry is not None and entry.size == 8 + length + end else None
