"""`OUT.partial/`: the features of each image in a file of its own, until all of them are joined into OUT.

    run.json              what the features are computed with: weights, configuration, size, dtype, layers
    HASH.safetensors      one image's features; HASH is of its path, the metadata has a digest of its content

The folder is locked while a run writes to it. A rerun takes up the parts only if run.json agrees with it, and of these
only parts whose image has not changed.
"""

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from internvit.data.digest import content_digest
from internvit.files import atomic_write, locked
from internvit.images import printable, read_file

logger = logging.getLogger(__name__)

_RUN = "run.json"
_FORMAT = "internvit features in parts"
_PART = re.compile(r"[0-9a-f]{32}\.safetensors")
_TEMPORARY = re.compile(r"\.([0-9a-f]{32}\.safetensors|run\.json)\.\d+\.writing")  # of a killed process


class Parts:
    """The folder of one extraction; use `open_parts`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def place(self, image: Path) -> Path:
        """The part file of an image."""
        return self.folder / f"{content_digest(str(image).encode('utf-8', 'surrogateescape'))}.safetensors"

    def is_current(self, image: Path, names: Sequence[str]) -> bool:
        """Whether there is a whole part with tensors of these names, computed from the image as it is now."""
        place = self.place(image)
        if not place.is_file():
            return False
        try:
            with safe_open(place, framework="pt") as file:
                digest, stored = (file.metadata() or {}).get("image"), set(file.keys())
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s); %s is computed again", place, error, printable(image))
            return False
        try:
            return stored == set(names) and digest == content_digest(read_file(image))
        except (ValueError, OSError):
            return False

    def write(self, image: Path, digest: str, features: dict[str, Tensor]) -> None:
        """Stores an image's features, with the digest of the bytes they were computed from."""
        data = save({name: tensor.contiguous() for name, tensor in features.items()}, {"image": digest})
        with atomic_write(self.place(image)) as temporary:
            temporary.write_bytes(data)

    def join(self, images: Sequence[Path], out: Path, metadata: dict[str, str]) -> None:
        """Writes all parts as one safetensors file, copying one after the other."""
        headers = [_read_header(self.place(image)) for image in images]
        joined: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for header, _ in headers:
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                joined[name] = {**entry, "data_offsets": [end + start, end + stop]}
            end += max(entry["data_offsets"][1] for entry in header.values())
        text = json.dumps(joined, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with atomic_write(out) as temporary, open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for image, (_, start) in zip(images, headers, strict=True):
                with open(self.place(image), "rb") as part:
                    part.seek(start)
                    shutil.copyfileobj(part, file)

    def remove(self) -> None:
        """Removes what this module has written, and the folder if nothing else is in it."""
        _remove_temporaries(self.folder)
        for path in list(self.folder.iterdir()):
            if path.name == _RUN or _PART.fullmatch(path.name):
                path.unlink()
        try:
            self.folder.rmdir()
        except OSError:
            logger.warning("%s is left: it holds other files", printable(self.folder))


def _remove_temporaries(folder: Path) -> None:
    """Removes what killed processes left; nobody else writes here while the folder is locked."""
    for path in list(folder.iterdir()):
        if _TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The entries of a safetensors file by name, and where its data start."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


@contextlib.contextmanager
def open_parts(out: Path, settings: dict[str, str], restart: bool = False) -> Iterator[Parts]:
    """The folder of parts beside `out`, locked while the block runs; made if there is none.

    Args:
        out: the file that the parts will be joined into.
        settings: all that the features depend on but the images.
        restart: remove the parts of a run with other settings, instead of raising.

    Raises:
        ValueError: the folder is not one of this module's, another run holds it, or its parts were computed with
            other settings; the message names which.
    """
    folder = out.with_name(out.name + ".partial")
    shown = printable(folder)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{shown}: expected a folder, or nothing; move it, or give another name for the output")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        others = [path.name for path in folder.iterdir() if not _TEMPORARY.fullmatch(path.name)]
        if others and not (folder / _RUN).exists():
            raise ValueError(f"{shown}: not parts of an interrupted run; move it, or give another name for the output")
        _remove_temporaries(folder)
        _claim(folder, settings, restart)
        yield Parts(folder)


def _claim(folder: Path, settings: dict[str, str], restart: bool) -> None:
    """Checks the settings of the parts that are there, and writes this run's."""
    run = folder / _RUN
    if run.exists():
        stored = _read_run(run)
        differing = sorted(k for k in stored.keys() | settings.keys() if stored.get(k) != settings.get(k))
        if not differing:
            return
        if not restart:
            changes = "; ".join(
                f"{key} was {_short(stored.get(key))}, is {_short(settings.get(key))}" for key in differing
            )
            raise ValueError(
                f"{printable(folder)}: parts of an interrupted run with other settings ({changes}); repeat that run, "
                f"remove the folder, or allow overwriting"
            )
        for path in folder.iterdir():
            if _PART.fullmatch(path.name):
                path.unlink()
    with atomic_write(run) as temporary:
        temporary.write_text(json.dumps({"format": _FORMAT, "settings": settings}, indent=1), encoding="utf-8")


def _read_run(run: Path) -> dict[str, str]:
    try:
        content = json.loads(run.read_bytes())
        if content["format"] == _FORMAT and isinstance(content["settings"], dict):
            return content["settings"]
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{printable(run)}: not written by an extraction; move its folder, or give another output name")


def _short(value: str | None) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
