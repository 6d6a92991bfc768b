"""Where images come from: files, folders, globs, text lists, Parquet with image bytes, WebDataset tars.

Sources are listed once, by the driver, and cut into shards; a worker opens what its shard names.
"""

import codecs
import functools
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from internvit.data import storage
from internvit.data.storage import Stat
from internvit.images import SUFFIXES, printable

_LISTS = (".txt", ".lst", ".list")
_ARCHIVES = (".tar", ".parquet")
_IMAGE_COLUMNS = ("image", "bytes", "img", "jpg", "jpeg", "png", "webp")
_MAX_LINKS = 40  # followed for one name, as Linux does
_WILDCARD = re.compile(r"[*?\[]")


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


def list_sources(patterns: Iterable[str], out: str | None = None) -> list[Stat]:
    """Files of images, tars and Parquet files, none twice, sorted within each pattern.

    Args:
        patterns: files, folders (searched recursively), globs, text lists with a path or URL in each line. Local paths
            become absolute.
        out: the output folder, whose files are no sources.

    Raises:
        FileNotFoundError: a pattern that matches nothing, by name.
        ValueError: a compressed tar, which cannot be read at an offset.
    """
    listed: dict[str, Stat] = {}
    for pattern in patterns:
        for entry in _expand(absolute(pattern)):
            if entry.path.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2")):
                raise ValueError(f"{printable(entry.path)}: expected a plain .tar; images in it are compressed already")
            if out is None or not entry.path.startswith(storage.join(out, "")):
                listed.setdefault(entry.path, entry)
    return list(listed.values())


def check_column(column: str | None, sources: Iterable[Stat]) -> None:
    """Raises a ValueError for the name of a column where no source is Parquet."""
    if column is not None and all(_suffix(source.path) != ".parquet" for source in sources):
        raise ValueError(f"column: expected Parquet files among the sources, got {column!r} and none")


def absolute(path: str) -> str:
    return path if storage.is_url(path) else os.path.abspath(os.path.expanduser(path))


def _suffix(path: str) -> str:
    return os.path.splitext(path.partition("::")[0])[1].lower()


def _expand(pattern: str) -> list[Stat]:
    if storage.is_folder(pattern):
        matches = [entry for entry in storage.walk(pattern) if _suffix(entry.path) in SUFFIXES.union(_ARCHIVES)]
    elif (entry := storage.stat(pattern)) is not None:
        if _suffix(pattern) in _LISTS:
            return _read_list(pattern)
        matches = [entry]
    else:
        matches = list(_glob(pattern))
    if not matches:
        raise FileNotFoundError(f"no image at {printable(pattern)}")
    return sorted(matches)


def _glob(pattern: str) -> Iterator[Stat]:
    wildcard = _WILDCARD.search(pattern)
    if wildcard is None:
        return
    base = pattern[: pattern.rindex("/", 0, wildcard.start()) + 1]
    if storage.is_url(pattern):
        base += pattern[len(pattern.partition("::")[0]) :]  # its chain
    expression = re.compile(_translate(pattern))
    yield from (entry for entry in storage.walk(base) if expression.fullmatch(entry.path))


def _translate(pattern: str) -> str:
    """A glob as a regular expression: * within a folder, ** across folders."""
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def expression(part: str) -> str:
        if len(part) > 2 and part[0] == "[" and part[-1] == "]":
            return "[" + re.sub(r"^!", "^", part[1:-1]).replace("\\", r"\\") + "]"
        return known.get(part) or re.escape(part)

    return "".join(map(expression, re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]*\])", pattern)))


def _read_list(path: str) -> list[Stat]:
    """The files that a text file names, one a line, in its order.

    A name may hold what `str.splitlines` takes for the end of a line, such as U+2028.
    """
    text = os.fsdecode(storage.read_bytes(path).removeprefix(codecs.BOM_UTF8))
    lines = [line.strip(" \t") for line in re.split(r"\r\n?|\n", text)]
    named = [absolute(line) for line in lines if line]
    return [storage.stat(name) or Stat(name, 0, 0) for name in named]


def cut(sources: Sequence[Stat], per_shard: int, first: int = 0) -> list[Shard]:
    """Shards of at most `per_shard` images, numbered from `first`; files in a row share shards."""
    shards: list[Shard] = []
    files: list[Stat] = []
    for source in sources:
        suffix = _suffix(source.path)
        if suffix not in _ARCHIVES:
            files.append(source)
            continue
        shards += _cut_files(files, per_shard)
        files = []
        try:
            shards += _cut_tar(source, per_shard) if suffix == ".tar" else _cut_parquet(source, per_shard)
        except (OSError, ValueError, tarfile.TarError) as error:  # pyarrow's errors are ValueErrors
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
        members, dangling = _tar_members(archive)
    shards = []
    for start in range(0, len(members), per_shard):
        chunk = members[start : start + per_shard]
        names, offsets, sizes = zip(*chunk, strict=True)
        shards.append(Shard(0, "tar", *source, 0, len(chunk), names, offsets, sizes))
    for start in range(0, len(dangling), per_shard):
        reasons = tuple(
            f"{printable(f'{source.path}#{link.name}')}: a link to {printable(link.linkname)}, which is not in the tar"
            for link in dangling[start : start + per_shard]
        )
        shards.append(Shard(0, "broken", *source, 0, len(reasons), reasons))
    return shards


def _tar_members(archive: tarfile.TarFile) -> tuple[list[tuple[str, int, int]], list[tarfile.TarInfo]]:
    """(name, offset, size) of the images as extraction would leave them, and links to nothing.

    Of several members of a name the last stays. A hard link is what its target was at that point of the tar, a symbolic
    one what its target is at the end.
    """
    members: dict[str, tarfile.TarInfo] = {}
    contents: dict[str, tuple[int, int] | str | None] = {}  # where the bytes are, or another path
    for member in archive:
        path = posixpath.normpath(member.name)
        before = contents.pop(path, None)  # so that images are in the order of their last members
        if member.isfile():
            contents[path] = member.offset_data, member.size
        elif member.islnk():  # GNU tar writes a file that it is given twice as a link to itself
            target = posixpath.normpath(member.linkname)
            contents[path] = before if target == path else contents.get(target)
        elif member.issym():
            contents[path] = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
        members[path] = member
    images: list[tuple[str, int, int]] = []
    dangling: list[tarfile.TarInfo] = []
    for path, content in contents.items():
        if os.path.splitext(path)[1].lower() not in SUFFIXES:
            continue
        place = _followed(contents, content) if isinstance(content, str) else content
        if place is None:
            dangling.append(members[path])
        else:
            images.append((members[path].name, *place))
    return images, dangling


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


def _cut_parquet(source: Stat, per_shard: int) -> list[Shard]:
    storage.import_pyarrow()
    from pyarrow import parquet

    with storage.open_file(source.path) as file:
        rows = parquet.ParquetFile(file).metadata.num_rows
    return [Shard(0, "parquet", *source, start, min(start + per_shard, rows)) for start in range(0, rows, per_shard)]


def open_shard(shard: Shard, column: str | None = None) -> list[Item]:
    """The images of a shard.

    Args:
        shard: of the plan.
        column: of Parquet files, with the images; by default one named image, bytes, img, jpg, jpeg, png or webp.

    Raises:
        ValueError: a Parquet file without such a column, or one that cannot be read.
    """
    if shard.kind == "files":
        return [Item(name, functools.partial(storage.read_bytes, name)) for name in shard.names]
    if shard.kind == "broken":
        return [Item(shard.source, functools.partial(_fail, reason)) for reason in shard.names]
    if shard.kind == "tar":
        members = zip(shard.names, shard.offsets, shard.sizes, strict=True)
        read = functools.partial(storage.read_bytes, shard.source)
        return [Item(f"{shard.source}#{name}", functools.partial(read, offset, size)) for name, offset, size in members]
    values = _read_rows(shard, column)
    return [
        Item(f"{shard.source}#{row}", functools.partial(_given, value))
        for row, value in enumerate(values, start=shard.start)
    ]


def _given(value: Any) -> Any:
    return value


def _fail(reason: str) -> Any:
    raise ValueError(reason)


def _read_rows(shard: Shard, column: str | None) -> list[Any]:
    """The values of the rows of a Parquet file; of its row groups only those that hold them are read."""
    from pyarrow import parquet

    with storage.open_file(shard.source) as opened:
        file = parquet.ParquetFile(opened)
        names = file.schema_arrow.names
        wanted = [name for name in ((column,) if column else _IMAGE_COLUMNS) if name in names]
        if not wanted:
            expected = repr(column) if column else f"one of {', '.join(_IMAGE_COLUMNS)}"
            raise ValueError(f"column: expected {expected} in {printable(shard.source)}, which has {', '.join(names)}")
        values: list[Any] = []
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            start, stop = max(shard.start - first, 0), min(shard.stop - first, count)
            if start < stop:
                table = file.read_row_group(group, columns=[wanted[0]])
                values += table.column(0).slice(start, stop - start).to_pylist()
            first += count
    return values
