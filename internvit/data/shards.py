"""Shards of sources: consecutive images whose features go into one file.

The driver cuts the sources into shards; a worker opens what its shard names.
"""

import functools
import os
import posixpath
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from internvit.data import storage
from internvit.data.sources import ARCHIVES, suffix
from internvit.data.storage import Stat
from internvit.images import SUFFIXES, printable

_IMAGE_COLUMNS = ("image", "bytes", "img", "jpg", "jpeg", "png", "webp")
_ROWS_READ = 64  # of a Parquet file at a time
_MAX_LINKS = 40  # followed for one name, as Linux does
_SLACK = 10**9
"""Nanoseconds: some object stores tell a file's time with its second in one answer, and with less in another."""


@dataclass(frozen=True)
class Shard:
    """Consecutive images of the sources, whose features are written into one file.

    Attributes:
        index: in the order of the sources.
        kind: "files"; members of a "tar"; rows of a "parquet"; or "broken", what of a source cannot be read.
        source: the tar or Parquet file, with its size and mtime (of files: their own).
        start, stop: rows of Parquet; positions in `names` otherwise.
        names: the files, or the tar's members; of what is broken, the reasons.
        offsets, sizes, mtimes: of the members or files.
    """

    index: int
    kind: str
    source: str
    size: int
    mtime: int
    start: int
    stop: int
    names: tuple[str, ...] = ()
    offsets: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    mtimes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.stop - self.start

    def files(self) -> list[Stat]:
        """The files of the sources that it reads."""
        if self.kind == "files":
            return [Stat(*entry) for entry in zip(self.names, self.sizes, self.mtimes, strict=True)]
        return [Stat(self.source, self.size, self.mtime)]


class Item(NamedTuple):
    """An image of a shard: its name, and what gives its encoded bytes."""

    path: str
    load: Callable[[], Any]


class MissingColumnError(ValueError):
    """A Parquet file without the column of images."""


def cut(sources: Sequence[Stat], per_shard: int, first: int = 0, column: str | None = None) -> list[Shard]:
    """Shards of at most `per_shard` images, numbered from `first`; files in a row share shards.

    Raises:
        MissingColumnError: a Parquet file has no `column`; nothing is planned then.
    """
    arrow_error = storage.import_pyarrow().ArrowException
    shards: list[Shard] = []
    files: list[Stat] = []
    for source in sources:
        kind = suffix(source.path)
        if kind not in ARCHIVES:
            files.append(source)
            continue
        shards += _cut_files(files, per_shard)
        files = []
        try:
            shards += _cut_tar(source, per_shard) if kind == ".tar" else _cut_parquet(source, per_shard, column)
        except MissingColumnError:
            raise
        except (OSError, ValueError, tarfile.TarError, arrow_error) as error:
            reason = f"{printable(source.path)}: cannot be read: {error}"
            shards.append(Shard(0, "broken", *source, 0, 1, (reason,)))
    shards += _cut_files(files, per_shard)
    return [replace(shard, index=first + number) for number, shard in enumerate(shards)]


def _cut_files(files: Sequence[Stat], per_shard: int) -> list[Shard]:
    shards = []
    for start in range(0, len(files), per_shard):
        names, sizes, mtimes = zip(*files[start : start + per_shard], strict=True)
        shards.append(Shard(0, "files", "", 0, 0, 0, len(names), names, (), sizes, mtimes))
    return shards


def _cut_tar(source: Stat, per_shard: int) -> list[Shard]:
    """Only headers are read, where the file system can seek."""
    with storage.open_file(source.path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
        members, unreadable = _tar_members(archive)
    shards = []
    for start in range(0, len(members), per_shard):
        chunk = members[start : start + per_shard]
        names, offsets, sizes = zip(*chunk, strict=True)
        shards.append(Shard(0, "tar", *source, 0, len(chunk), names, offsets, sizes))
    for start in range(0, len(unreadable), per_shard):
        chunk_of_others = unreadable[start : start + per_shard]
        reasons = tuple(f"{printable(f'{source.path}#{m.name}')}: {_why_unreadable(m)}" for m in chunk_of_others)
        shards.append(Shard(0, "broken", *source, 0, len(reasons), reasons))
    return shards


def _why_unreadable(member: tarfile.TarInfo) -> str:
    if member.isfile():
        return "stored sparse, without its zeros; extract it, or write the tar without --sparse"
    return f"a link to {printable(member.linkname)}, which is not in the tar"


def _tar_members(archive: tarfile.TarFile) -> tuple[list[tuple[str, int, int]], list[tarfile.TarInfo]]:
    """(name, offset, size) of the images as extraction would leave them; links to nothing and sparse members, whose
    bytes do not lie in one piece.

    Of several members of a name the last stays. A hard link is what its target was at that point of the tar, a symbolic
    one what its target is at the end.
    """
    members: dict[str, tarfile.TarInfo] = {}
    contents: dict[str, tuple[int, int] | str | None] = {}  # where the bytes are, or another path
    for member in archive:
        path = posixpath.normpath(member.name)
        before = contents.pop(path, None)  # so that images are in the order of their last members
        if member.isfile():
            contents[path] = None if member.issparse() else (member.offset_data, member.size)
        elif member.islnk():  # GNU tar writes a file that it is given twice as a link to itself
            target = posixpath.normpath(member.linkname)
            contents[path] = before if target == path else contents.get(target)
        elif member.issym():
            contents[path] = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
        members[path] = member
    images: list[tuple[str, int, int]] = []
    unreadable: list[tarfile.TarInfo] = []
    for path, content in contents.items():
        if os.path.splitext(path)[1].lower() not in SUFFIXES:
            continue
        place = _followed(contents, content) if isinstance(content, str) else content
        if place is None:
            unreadable.append(members[path])
        else:
            images.append((members[path].name, *place))
    return images, unreadable


def _followed(contents: Mapping[str, tuple[int, int] | str | None], path: str) -> tuple[int, int] | None:
    """Where the bytes of a path are, through links of it and of the folders above it; None if they lead nowhere."""
    for _ in range(_MAX_LINKS):
        parts = path.split("/")
        heads = ("/".join(parts[:end]) for end in range(1, len(parts) + 1))
        head, target = next(((head, found) for head in heads if (found := contents.get(head))), ("", None))
        if not isinstance(target, str):
            return target if head == path else None
        path = posixpath.normpath(posixpath.join(target, path[len(head) + 1 :]))
    return None


def _cut_parquet(source: Stat, per_shard: int, column: str | None) -> list[Shard]:
    from pyarrow import parquet

    with storage.open_file(source.path) as opened:
        file = parquet.ParquetFile(opened)
        rows = file.metadata.num_rows
        _image_column(file, source.path, column)
    return [Shard(0, "parquet", *source, start, min(start + per_shard, rows)) for start in range(0, rows, per_shard)]


def _image_column(file: Any, path: str, column: str | None) -> str:
    names = file.schema_arrow.names
    wanted = [name for name in ((column,) if column else _IMAGE_COLUMNS) if name in names]
    if not wanted:
        expected = repr(column) if column else f"one of {', '.join(_IMAGE_COLUMNS)}"
        raise MissingColumnError(f"column: expected {expected} in {printable(path)}, which has {', '.join(names)}")
    return wanted[0]


def open_shard(shard: Shard, column: str | None = None) -> list[Item]:
    """The images of a shard.

    Args:
        shard: of the plan.
        column: of Parquet files, with the images; by default one named image, bytes, img, jpg, jpeg, png or webp.

    Raises:
        ValueError: a Parquet file without such a column; a tar or a Parquet file that is not as it was listed.
    """
    check_unchanged(shard)
    if shard.kind == "files":
        return [Item(name, functools.partial(storage.read_bytes, name)) for name in shard.names]
    if shard.kind == "broken":
        return [Item(shard.source, functools.partial(_fail, reason)) for reason in shard.names]
    if shard.kind == "tar":
        members = zip(shard.names, shard.offsets, shard.sizes, strict=True)
        read = functools.partial(storage.read_bytes, shard.source)
        return [Item(f"{shard.source}#{name}", functools.partial(read, offset, size)) for name, offset, size in members]
    return _read_rows(shard, column)


def check_unchanged(shard: Shard) -> None:
    """Raises a ValueError if the tar or Parquet file of a shard has changed since it was listed: offsets and rows would
    be those of other images."""
    if shard.kind not in ("tar", "parquet"):
        return
    slack = _SLACK if storage.is_url(shard.source) else 0
    now = storage.stat(shard.source)
    later = now is not None and now.mtime and shard.mtime and abs(now.mtime - shard.mtime) > slack
    if now is None or now.size != shard.size or later:
        raise ValueError(f"{printable(shard.source)}: changed, or gone, since this run has listed it")


def _given(value: Any) -> Any:
    return value


def _fail(reason: str) -> Any:
    raise ValueError(reason)


def _read_rows(shard: Shard, column: str | None) -> list[Item]:
    """The rows of a Parquet file; where they cannot be read each fails by name. Of its row groups only those that hold
    them are read, a few rows at a time.

    Paths in the column are relative to the file's folder: workers have other working directories.
    """
    import pyarrow as pa
    from pyarrow import parquet

    names = [f"{shard.source}#{row}" for row in range(shard.start, shard.stop)]
    values: list[Any] = []
    try:
        with storage.open_file(shard.source) as opened:
            file = parquet.ParquetFile(opened)
            wanted = _image_column(file, shard.source, column)
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                start, stop = max(shard.start - first, 0), min(shard.stop - first, count)
                if start < stop:
                    values += _rows_of_group(file, group, wanted, start, stop)
                first += count
        if len(values) != len(shard):
            raise ValueError(f"expected {len(shard)} rows from {shard.start} on, got {len(values)}")
    except MissingColumnError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = f"cannot be read: {error}"
        return [Item(name, functools.partial(_fail, f"{printable(name)}: {reason}")) for name in names]
    below = storage.parent(shard.source)
    return [
        Item(name, functools.partial(_given, _from(below, value))) for name, value in zip(names, values, strict=True)
    ]


def _rows_of_group(file: Any, group: int, column: str, start: int, stop: int) -> list[Any]:
    values: list[Any] = []
    first = 0
    for batch in file.iter_batches(batch_size=_ROWS_READ, row_groups=[group], columns=[column]):
        values += batch.column(0).slice(max(start - first, 0), max(stop - max(start, first), 0)).to_pylist()
        first += batch.num_rows
        if first >= stop:
            break
    return values


def _from(folder: str, value: Any) -> Any:
    """A value of a column of images, paths in it as seen from a folder."""
    if isinstance(value, str):
        return value if storage.is_url(value) or os.path.isabs(value) else storage.join(folder, value)
    if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
        return {**value, "path": _from(folder, value["path"])}
    return value
