"""What a training run writes: a kill at any moment costs only the steps since the last checkpoint."""

import csv
import io
from pathlib import Path
from typing import Any

import torch

from internvit.files import atomic_write

COLUMNS = ("step", "loss", "lr", "miou")
# What a checkpoint holds, and the types of it.
CONTENT = {
    "recipe": dict,
    "data": dict,
    "step": int,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "rng": dict,
}


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces a checkpoint atomically.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's archive writer hides the error of the disk
        raise OSError(f"{path}: cannot be written: {error.__context__ or error}") from error


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, on the CPU; None if there is none yet.

    Raises:
        ValueError: a file that is no checkpoint of this script.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the pickle, the archive or the disk raised
        raise ValueError(f"{path}: not a checkpoint of this script: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: not a checkpoint of this script: expected a dict, got {type(state).__name__}")
    for name, kind in CONTENT.items():
        if not isinstance(state.get(name), kind):
            got = type(state[name]).__name__ if name in state else "nothing"
            raise ValueError(f"{path}: not a checkpoint of this script: expected {kind.__name__} {name!r}, got {got}")
    return state


def check_picture(path: Path) -> None:
    """Raises ValueError for a picture that no run has drawn: a run begins its log before, and writes checkpoints."""
    written = path.exists() or path.is_symlink()
    if written and not any((path.parent / name).exists() for name in ("log.csv", "checkpoint.pt")):
        raise ValueError(
            f"{path}: not a picture of this script, which has its log.csv beside it; move it, or give another --out"
        )


def rng_state() -> dict[str, Any]:
    """Of the generators that dropout and drop path draw from."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class Log:
    """A CSV of the run: step, loss, learning rate, and mIoU where it was measured.

    Args:
        path: of the file; None writes nothing.
        step: rows after it are dropped, because these steps are run again.

    Raises:
        ValueError: the file is there and is no such log.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self._path = path
        if path is None:
            return
        rows = [row for row in _read_log(path) if int(row["step"]) <= step]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(path) as temporary:
            temporary.write_bytes(text.getvalue().encode())

    def add(self, step: int, loss: float | str = "", lr: float | str = "", miou: float | str = "") -> None:
        if self._path is None:
            return
        with open(self._path, "a", newline="") as file:
            csv.writer(file).writerow([step, loss, lr, miou])


def _read_log(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log; a kill may have cut the last one."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"expected the columns {', '.join(COLUMNS)}")
            return [row for row in reader if None not in row.values() and row["step"].isdecimal()]
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path}: not a log of this script ({error}); move it, or give another --out") from error
