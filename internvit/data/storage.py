"""Files and folders by local path or by URL of any file system of pyarrow or fsspec.

A URL is one of pyarrow's schemes (s3, gs, abfs, hdfs, file), or else fsspec's, whose chains work as well:
`zip://photos/*.png::/archives/a.zip`. Local paths need neither library.
"""

import functools
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from internvit.files import atomic_write, staging
from internvit.images import printable, read_file, walk_files

# scheme, authority with its port, path, chain
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://((?:[^/:]|:(?!:))*)(.*?)((?:::.*)?)", re.DOTALL)
# Their objects appear whole when the upload ends; a rename would copy them.
_OBJECT_STORES = re.compile(r"\b(s3a?|gcs|gs|abfss?|az)\b")

_UNFINISHED = re.compile(r"\.(.+)\.\w+\.writing")


class Stat(NamedTuple):
    """A file: its path or URL, size in bytes and time of the last change in nanoseconds (0 where unknown)."""

    path: str
    size: int
    mtime: int


def is_url(path: str) -> bool:
    return _URL.fullmatch(path) is not None


def local_path(path: str) -> str | None:
    """The path of a local file or of a file:// URL; None elsewhere."""
    match = _URL.fullmatch(path)
    if match is None:
        return path
    return filesystem(path)[1] if match[1].lower() == "file" and not match[4] else None


def import_pyarrow() -> Any:
    """The module pyarrow.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ImportError(
            "folders of features, Parquet and URLs need pyarrow: pip install 'internvit[data]'"
        ) from error
    return pyarrow


@functools.lru_cache(maxsize=64)
def _root(scheme: str, authority: str, chain: str) -> tuple[Any, str]:
    """The file system of a host or bucket, and its path in it."""
    import_pyarrow()
    from pyarrow import fs

    url = f"{scheme}://{authority}{chain}"
    if scheme in ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file") and not chain:
        return fs.FileSystem.from_uri(url)
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{url}: pyarrow has no such file system, others need fsspec: pip install fsspec") from error
    system, path = fsspec.core.url_to_fs(url)
    return fs.PyFileSystem(fs.FSSpecHandler(system)), path


def filesystem(url: str) -> tuple[Any, str]:
    """A URL's pyarrow file system and the path in it; ValueError for a scheme that neither library has."""
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"{url}: expected a URL")
    try:
        # "scheme:///path": from the root, not from a working directory.
        system, root = _root(match[1].lower(), match[2] or match[3][:1], match[4])
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    rest = match[3].strip("/")
    return system, f"{root.rstrip('/')}/{rest}" if root and rest else root or rest


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """A file's bytes from `offset` on, all or `size` of them.

    Raises:
        ValueError: not a regular file, or one that cannot be read; the message names it.
        FileNotFoundError: no such file.
    """
    if not is_url(path) and not offset and size is None:
        return read_file(path)
    try:
        with open_file(path) as file:
            file.seek(offset)
            data = file.read() if size is None else file.read(size)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{printable(path)}: no such file") from error
    except OSError as error:
        raise ValueError(f"{printable(path)}: cannot be read: {error}") from error
    if size is not None and len(data) != size:
        raise ValueError(f"{printable(path)}: expected {size} bytes at {offset}, got {len(data)}")
    return data


def open_file(path: str) -> Any:
    """A seekable binary file to read."""
    if not is_url(path):
        return open(path, "rb")
    system, inner = filesystem(path)
    return system.open_input_file(inner)


def stat(path: str) -> Stat | None:
    """A file's size and time; None if there is no such file."""
    if not is_url(path):
        if "\0" in path:
            return None
        try:
            status = os.stat(path)
        except OSError:
            # A link to nothing is listed: whoever opens it reports it.
            return Stat(path, 0, 0) if os.path.lexists(path) else None
        return Stat(path, status.st_size, status.st_mtime_ns)
    from pyarrow import fs

    system, inner = filesystem(path)
    info = system.get_file_info(inner)
    return Stat(path, info.size or 0, info.mtime_ns or 0) if info.type == fs.FileType.File else None


def is_folder(path: str) -> bool:
    if not is_url(path):
        return os.path.isdir(path)
    from pyarrow import fs

    system, inner = filesystem(path)
    return system.get_file_info(inner).type == fs.FileType.Directory


def walk(folder: str) -> Iterator[Stat]:
    """The files in a folder and below, in no order; of local ones those of `walk_files`, links to nothing as well."""
    if not is_url(folder):
        for path in walk_files(folder):
            entry = stat(path)
            if entry is not None and (os.path.isfile(path) or not os.path.exists(path)):
                yield entry
        return
    from pyarrow import fs

    system, inner = filesystem(folder)
    match = _URL.fullmatch(folder)
    assert match is not None
    head = f"{match[1]}://{match[2]}{match[3].rstrip('/')}" + ("/" if match[2] or match[3] else "")
    for info in system.get_file_info(fs.FileSelector(inner, recursive=True, allow_not_found=True)):
        if info.type == fs.FileType.File:
            below = info.path[len(inner.rstrip("/")) :].strip("/") if inner.strip("/") else info.path.strip("/")
            yield Stat(f"{head}{below}{match[4]}", info.size or 0, info.mtime_ns or 0)


def write_atomically(path: str, data: Any) -> None:
    """Writes a file so that it is there whole or not at all; folders above it are made.

    A local file is renamed when it is on the disk. In an object store it appears when the upload ends. Elsewhere it is
    renamed.
    """
    if not is_url(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)
        return
    system, inner = filesystem(path)
    folder, _, name = inner.rpartition("/")
    if _OBJECT_STORES.search(system.type_name):
        with system.open_output_stream(inner) as stream:
            stream.write(data)
        return
    system.create_dir(folder, recursive=True)
    unfinished = f"{folder}/.{name}.{uuid.uuid4().hex}.writing"
    with system.open_output_stream(unfinished) as stream:
        stream.write(data)
    system.move(unfinished, inner)


def remove_unfinished(folder: str, only: str | None = None) -> None:
    """Removes what killed processes have left of `write_atomically`, of the file `only` or of all; what a local process
    still writes stays."""
    if not is_url(folder):
        names = [_UNFINISHED.fullmatch(name) for name in (os.listdir(folder) if os.path.isdir(folder) else ())]
        for match in filter(None, names):
            if only in (None, match[1]):
                with staging(Path(folder), match[1]):  # takes the place over, and removes it at the end
                    pass
        return
    for entry in walk(folder):
        left = _UNFINISHED.fullmatch(entry.path.partition("::")[0].rpartition("/")[2])
        if left and only in (None, left[1]):
            remove(entry.path)


def remove(path: str) -> None:
    """Removes a file, if it is there."""
    if not is_url(path):
        Path(path).unlink(missing_ok=True)
        return
    if stat(path) is not None:
        system, inner = filesystem(path)
        system.delete_file(inner)


def join(folder: str, *names: str) -> str:
    """A path below a folder or URL; a chain stays at the end."""
    chain = _chain(folder)
    return "/".join([folder[: len(folder) - len(chain)].rstrip("/"), *names]) + chain


def parent(path: str) -> str:
    """The folder of a file or URL; a chain stays at the end."""
    chain = _chain(path)
    return path[: len(path) - len(chain)].rpartition("/")[0] + chain


def _chain(path: str) -> str:
    match = _URL.fullmatch(path)
    return match[4] if match else ""
