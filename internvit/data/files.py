"""Files that are whole whenever they are there, locks against a second run, and fingerprints of content."""

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.writing")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """The path of an empty file to write to; it replaces `path` when the block ends without an error.

    The file is created in the same folder with the user's umask and flushed to the disk before it is renamed. A link
    at `path` is replaced, not followed. After a kill, only a name that matches `TEMPORARY` is left.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.writing")
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Makes a rename survive a power failure, where the system can flush a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Removes what killed calls of `atomic_write` left in a folder; only whoever holds its lock may do so."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(lock: Path, what: str) -> Iterator[None]:
    """Holds a lock file for as long as the block runs; the system releases it when the process dies.

    Args:
        lock: the file, in a folder that exists.
        what: the thing that is locked, for the message.

    Raises:
        ValueError: another process or thread holds it.
    """
    from filelock import FileLock, Timeout

    holder = FileLock(lock, timeout=0)
    try:
        holder.acquire()
    except Timeout as error:
        raise ValueError(f"{what}: another run is writing there; wait for it, or give another name") from error
    try:
        yield
    finally:
        holder.release()


def content_digest(data: bytes) -> str:
    """128 bits of SHA-256, as 32 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()[:32]


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, dtypes, shapes and bits of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
