"""Files that are written whole or not at all, locks of folders, and JSON that anybody may have written.

A file is written in a folder of its own beside its destination, flushed to the disk, and renamed. That folder is
locked while it is in use, so that the next writer recognises what a killed process has left, and uses it again.
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MAX_JSON_BYTES = 64 * 2**20  # the index of a 1000B model has about 10 MB


class Staging:
    """Files on their way into a folder; see `staging`."""

    def __init__(self, folder: Path, place: Path, mode: int) -> None:
        self._folder, self._place, self._mode = folder, place, mode

    def path(self, name: str) -> Path:
        """Where to write the file that will be `folder / name`."""
        return self._place / name

    def flush(self) -> None:
        """Gives every staged file the user's permissions and has the system write it to the disk."""
        for path in self._place.iterdir():
            path.chmod(self._mode)  # safetensors gives its files 0600
            _fsync(path)

    def publish(self, names: Mapping[str, str]) -> None:
        """Moves each staged file to its name in the folder, in this order; `flush` comes before."""
        for staged, name in names.items():
            os.replace(self.path(staged), self._folder / name)
        _fsync(self._folder)


@contextlib.contextmanager
def staging(folder: Path, name: str) -> Iterator[Staging]:
    """A place in `folder` to write files in before they take their names; it is removed at the end.

    Args:
        folder: of the destination.
        name: of what is written. A killed process leaves `.NAME.0.writing`; the next writer of `name` takes it over.
    """
    root, lock = _claim(folder, name)
    place = root / "files"
    try:
        shutil.rmtree(place, ignore_errors=True)  # of a killed process
        place.mkdir()
        yield Staging(folder, place, os.fstat(lock).st_mode & 0o777)
    except OSError as error:
        if error.errno in _FULL and error.filename is None:  # a write names nothing
            error.filename = os.fspath(folder)
        raise
    finally:
        # The lock goes last: another process may take the folder over at that moment, and then it is not empty.
        shutil.rmtree(place, ignore_errors=True)
        if fcntl is None:
            os.close(lock)  # Windows does not remove an open file
        (root / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            root.rmdir()
        if fcntl is not None:
            os.close(lock)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path to write a file to; it takes its name at the end, and after an error nothing has changed.

    Example:
        >>> with atomic_write("report.json") as path:
        ...     path.write_text("{}")
    """
    path = Path(path)
    with staging(path.parent, path.name) as stage:
        yield stage.path(path.name)
        stage.flush()
        stage.publish({path.name: path.name})


def _claim(folder: Path, name: str) -> tuple[Path, int]:
    """The first of the folders `.NAME.0.writing`, `.NAME.1.writing`, ... that no live process has, and its lock."""
    for number in itertools.count():
        root = folder / f".{name[:50]}.{number}.writing"  # of a long name, what a file system takes
        try:
            root.mkdir(exist_ok=True)
        except FileExistsError:  # a file
            continue
        lock = None if root.is_symlink() else _lock(root / "lock")
        if lock is not None:
            return root, lock
    raise AssertionError("unreachable")


def _lock(path: Path) -> int | None:
    """The descriptor of a locked file, or None if another process has it."""
    created = True
    try:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            created = False
            lock = os.open(path, os.O_RDWR)
    except (FileNotFoundError, PermissionError):  # removed by its owner this moment; another user's
        return None
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            created = os.path.samestat(os.fstat(lock), os.stat(path))  # its owner may have removed it meanwhile
    except (BlockingIOError, FileNotFoundError):
        created = False
    except OSError:  # a file system without locks: whoever creates the file has it
        pass
    if created:
        return lock
    os.close(lock)
    return None


@contextlib.contextmanager
def locked(folder: Path, shared: bool = False, wait: bool = True) -> Iterator[None]:
    """Holds a lock of the folder: one writer alone, or any number of readers.

    Args:
        folder: that is there.
        shared: as a reader.
        wait: until others have given the lock back.

    The lock binds only those who ask for it, and holds nothing where the file system has no locks.

    Raises:
        ValueError: somebody else has the lock, and `wait` is False.
    """
    with contextlib.ExitStack() as stack:
        # A file system without locks, a folder that may be entered and not read: go on without.
        with contextlib.suppress(OSError):
            if fcntl is not None:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
                try:
                    fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ValueError(f"{folder}: another process is writing there") from error
        yield


def _fsync(path: Path) -> None:
    """Has the system write a file, or a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: a FIFO or the like, more than 64 MiB, or not JSON; the message names the file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: expected a regular file")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: expected at most {_MAX_JSON_BYTES} bytes of JSON, got {path.stat().st_size}")
    try:
        return json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError(f"{path}: not valid JSON: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
