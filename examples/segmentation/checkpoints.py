"""What a training run leaves on the disk, so that a kill at any moment costs only the steps since the last checkpoint.

A file is written under another name, flushed to the disk, and renamed: under its own name there is always a whole one.
"""

import csv
from pathlib import Path
from typing import Any

import torch

from internvit.files import atomic_write

COLUMNS = ("step", "loss", "lr", "miou")


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces a checkpoint, or leaves the one that is there."""
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint, on the CPU; None if there is none yet.

    Raises:
        ValueError: a file that is no checkpoint.
    """
    if not path.exists():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the pickle, the archive or the disk raised
        raise ValueError(f"{path}: not a checkpoint of this script: {error}") from error


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
        path: of the file.
        step: rows after it are dropped, as the steps will be made again.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows = []
        if path.exists():
            with open(path, newline="") as file:
                rows = [r for r in csv.DictReader(file) if None not in r.values() and int(r["step"]) <= step]
        with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._path = path

    def add(self, step: int, loss: float | str = "", lr: float | str = "", miou: float | str = "") -> None:
        with open(self._path, "a", newline="") as file:
            csv.writer(file).writerow([step, loss, lr, miou])
