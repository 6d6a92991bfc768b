"""Where images come from: files, folders, globs, text lists, Parquet with image bytes, WebDataset tars.

Sources are listed once, by the driver; `internvit.data.shards` cuts them.
"""

import codecs
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from internvit.data import storage
from internvit.data.storage import Stat
from internvit.images import SUFFIXES, printable

ARCHIVES = (".tar", ".parquet")
_LISTS = (".txt", ".lst", ".list")
_WILDCARD = re.compile(r"[*?\[]")
_OF_A_RUN = re.compile(r"(.*)/(?:data|plan|failures)/\d+\.parquet((?:::.*)?)", re.DOTALL)

RUN_FILE, RUN_FORMAT = "run.json", "internvit features in shards"
"""The file that a folder of features has, and its "format"."""


def list_sources(patterns: Iterable[str], out: str | None = None) -> list[Stat]:
    """Files of images, tars and Parquet files, none twice, sorted within each pattern.

    Args:
        patterns: files, folders (searched recursively), globs, text lists with a path or URL in each line. Local paths
            become absolute. Features that an extraction wrote below a folder are no sources.
        out: the output folder, whose files are no sources either.

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
    if column is not None and all(suffix(source.path) != ".parquet" for source in sources):
        raise ValueError(f"column: expected Parquet files among the sources, got {column!r} and none")


def absolute(path: str) -> str:
    """A local path from the root; `link/..` is the folder above the link's target, as for the system."""
    if storage.is_url(path):
        return path
    path = os.path.expanduser(path)
    plain = os.path.abspath(path)
    if ".." in path.split(os.sep) and (real := os.path.realpath(path)) != os.path.realpath(plain):
        return real
    return plain


def suffix(path: str) -> str:
    """Of a file's name, in lower case; of a URL's before its chain."""
    return os.path.splitext(path.partition("::")[0] if storage.is_url(path) else path)[1].lower()


def _expand(pattern: str) -> list[Stat]:
    if storage.is_folder(pattern):
        below = (entry for entry in storage.walk(pattern) if suffix(entry.path) in SUFFIXES.union(ARCHIVES))
        matches = list(_without_features(below))
    elif (entry := storage.stat(pattern)) is not None:
        if suffix(pattern) in _LISTS:
            return _read_list(pattern)
        matches = [entry]
    else:
        matches = list(_glob(pattern))
    if not matches:
        raise FileNotFoundError(f"no image at {printable(pattern)}")
    return sorted(matches)


def _without_features(entries: Iterable[Stat]) -> Iterator[Stat]:
    """Of a folder's files those that no extraction has written, whatever the folder is called this time."""
    runs: dict[tuple[str, str], bool] = {}
    for entry in entries:
        if (match := _OF_A_RUN.fullmatch(entry.path)) is None:
            yield entry
            continue
        folder, chain = match.groups()
        if (folder, chain) not in runs:
            runs[folder, chain] = _is_run(folder + chain)
        if not runs[folder, chain]:
            yield entry


def _is_run(folder: str) -> bool:
    try:
        content = json.loads(storage.read_bytes(storage.join(folder, RUN_FILE)))
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and content.get("format") == RUN_FORMAT


def _glob(pattern: str) -> Iterator[Stat]:
    wildcard = _WILDCARD.search(pattern)
    if wildcard is None:
        return
    if not storage.is_url(pattern):
        yield from _local_glob(pattern)
        return
    base = pattern[: pattern.rindex("/", 0, wildcard.start()) + 1]
    base += pattern[len(pattern.partition("::")[0]) :]  # its chain
    expression = re.compile(_translate(pattern))
    yield from (entry for entry in storage.walk(base) if expression.fullmatch(entry.path))


def _local_glob(pattern: str) -> Iterator[Stat]:
    """Local files; a linked folder matches by its own name. Below `**` each file comes once, as `walk` lists it."""
    before, deep, _ = pattern.partition("**")
    if not deep:
        for path in Path("/").glob(pattern.lstrip("/")):
            entry = storage.stat(str(path))
            if entry is not None and not path.is_dir():
                yield entry
        return
    head = before[: before.rindex("/") + 1]
    for base in Path("/").glob(head.strip("/")) if head != "/" else [Path("/")]:
        if base.is_dir():
            start = storage.join(str(base), "")
            expression = re.compile(re.escape(start) + _translate(pattern[len(head) :]))
            yield from (entry for entry in storage.walk(start) if expression.fullmatch(entry.path))


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
