"""The plan of an extraction: which shard has which images, kept in the output folder.

The first run writes `plan/00000.parquet`. A rerun lists the sources again: files that are new get new shards in a
further file; files that have changed or are gone are refused by name.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

from internvit.data import storage
from internvit.data.sources import Shard, cut
from internvit.data.storage import Stat
from internvit.images import printable

_NAMED = 5  # files in a message


def update_plan(folder: str, sources: Sequence[Stat], per_shard: int) -> list[Shard]:
    """The shards of all sources, those of an earlier run first and as they were.

    Raises:
        ValueError: a source of an earlier run has changed or is not among the sources.
    """
    shards: list[Shard] = []
    number = 0
    while storage.stat(place := storage.join(folder, "plan", f"{number:05d}.parquet")) is not None:
        shards += _read(place)
        number += 1
    planned = {file.path: file for shard in shards for file in shard.files()}
    given = {source.path: source for source in sources}
    gone = [path for path in planned if path not in given]
    changed = [path for path, file in planned.items() if path in given and given[path] != file]
    if gone or changed:
        raise ValueError(
            f"{printable(folder)}: other sources than those of the run that began it: {_some(changed, 'changed')}"
            f"{', ' if gone and changed else ''}{_some(gone, 'not given, or gone')}; restore them, or give another "
            "folder"
        )
    new = cut([source for source in sources if source.path not in planned], per_shard, len(shards))
    if new:
        storage.write_atomically(place, _serialize(new))
    return shards + new


def _some(paths: list[str], what: str) -> str:
    if not paths:
        return ""
    more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
    return f"{len(paths)} {what} ({', '.join(map(printable, paths[:_NAMED]))}{more})"


def _serialize(shards: Sequence[Shard]) -> Any:
    """Paths are stored as bytes: a name need not be UTF-8."""
    import pyarrow as pa
    from pyarrow import parquet

    text: Callable[[str], bytes] = os.fsencode
    columns: dict[str, Any] = {}
    for field in fields(Shard):
        values = [getattr(shard, field.name) for shard in shards]
        if field.name == "names":
            columns[field.name] = pa.array([[text(n) for n in names] for names in values], pa.list_(pa.binary()))
        elif field.name in ("offsets", "sizes", "mtimes"):
            columns[field.name] = pa.array(values, pa.list_(pa.int64()))
        elif field.name in ("kind", "source"):
            columns[field.name] = pa.array([text(value) for value in values], pa.binary())
        else:
            columns[field.name] = pa.array(values, pa.int64())
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns), sink)
    return sink.getvalue()


def _read(place: str) -> list[Shard]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows = parquet.read_table(pa.BufferReader(storage.read_bytes(place))).to_pylist()
        return [Shard(**{name: _python(value) for name, value in row.items()}) for row in rows]
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"{printable(place)}: not a plan of an extraction: {error}") from error


def _python(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_python, value))
    return os.fsdecode(value) if isinstance(value, bytes) else value
