"""The plan of an extraction: which shard has which images, kept in the output folder.

The first run writes `plan/00000.parquet`. A rerun lists the sources again: files that are new get new shards in a
further file; files that have changed or are gone are refused by name. A file that failed has no features: where those
are tried again, one that has changed gets a new shard, and one that is gone is forgotten.
"""

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from typing import Any

from internvit.data import storage
from internvit.data.shard_files import ShardFiles
from internvit.data.shards import Shard, cut
from internvit.data.storage import Stat
from internvit.images import printable

_NAMED = 5  # files in a message


def update_plan(
    files: ShardFiles,
    sources: Sequence[Stat],
    per_shard: int,
    retry_failed: bool = False,
    column: str | None = None,
) -> list[Shard]:
    """The shards of all sources, those of an earlier run first and as they were, but for files that failed.

    Args:
        files: the output folder.
        sources: as they are now.
        per_shard: images in a new shard.
        retry_failed: leave files that failed, and have changed or are gone, out of the shards that they are in.
        column: of Parquet files, with the images.

    Raises:
        ValueError: a source of an earlier run has changed or is not among the sources; a Parquet file has no such
            column.
    """
    plans: list[list[Shard]] = []
    while storage.stat(_place(files, len(plans))) is not None:
        plans.append(_read(_place(files, len(plans))))
    shards = [shard for plan in plans for shard in plan]
    planned = {file.path: file for shard in shards for file in shard.files()}
    given = {source.path: source for source in sources}
    differing = {path for path, file in planned.items() if given.get(path) != file}
    failed = _failed(files, shards, differing)
    refused = [path for path in planned if path in differing and not (retry_failed and path in failed)]
    if refused:
        changed, gone = ([p for p in refused if (p in given) is there] for there in (True, False))
        raise ValueError(
            f"{printable(files.folder)}: other sources than those of the run that began it: "
            f"{_some(changed, 'changed')}{', ' if gone and changed else ''}{_some(gone, 'not given, or gone')}; "
            "restore them, or give another folder"
            + ("; retry_failed (--retry-failed) accepts those that failed" if failed and not retry_failed else "")
        )
    if failed:
        plans = [_without(files, number, plan, failed) for number, plan in enumerate(plans)]
    added = [source for source in sources if source.path not in planned or source.path in failed]
    new = cut(added, per_shard, len(shards), column)
    if new:
        storage.write_atomically(_place(files, len(plans)), _serialize(new))
    return [shard for plan in [*plans, new] for shard in plan]


def _place(files: ShardFiles, number: int) -> str:
    return storage.join(files.folder, "plan", f"{number:05d}.parquet")


def _failed(files: ShardFiles, shards: Sequence[Shard], paths: Collection[str]) -> set[str]:
    """Which of these files have no features because they failed: of an archive that was opened every image."""
    failed: set[str] = set()
    partly: set[str] = set()
    for shard in shards if paths else ():
        within = [file.path for file in shard.files() if file.path in paths]
        if not within:
            continue
        if shard.kind in ("tar", "parquet"):
            (failed if files.failed(shard.index) == len(shard) else partly).update(within)
            continue
        listed = files.failed_paths(shard.index)
        failed.update(path for path in within if printable(path) in listed)
        partly.update(path for path in within if printable(path) not in listed)
    return failed - partly


def _without(files: ShardFiles, number: int, plan: Sequence[Shard], failed: Collection[str]) -> list[Shard]:
    """A file of the plan, written again without these files of its shards, which are then to be computed again.

    The data files go first: of a run that is killed here the files still count as failed.
    """
    shards = [_left(shard, failed) for shard in plan]
    if shards != plan:
        for shard in (new for new, old in zip(shards, plan, strict=True) if new != old):
            storage.remove(files.data(shard.index))
        storage.write_atomically(_place(files, number), _serialize(shards))
    return shards


def _left(shard: Shard, failed: Collection[str]) -> Shard:
    """A shard without these files; with none left it keeps its number."""
    entries = shard.files()
    kept = [entry for entry in entries if entry.path not in failed]
    if len(kept) == len(entries):
        return shard
    names, sizes, mtimes = zip(*kept, strict=True) if kept else ((), (), ())
    left = Shard(shard.index, "files", "", 0, 0, 0, len(kept))
    return replace(left, names=names, sizes=sizes, mtimes=mtimes)


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
