"""The connector of a checkpoint, of the kind that its config.json names."""

import os
from pathlib import Path

import torch

from internvit.checkpoint.files import CONFIG
from internvit.files import read_json
from internvit.multimodal.connector import InternVLConnector
from internvit.multimodal.flash_connector import InternVLFlashConnector


def load_connector(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> InternVLConnector | InternVLFlashConnector:
    """An `InternVLFlashConnector` where config.json has `flash_mode`, else an `InternVLConnector`.

    Raises:
        FileNotFoundError, ValueError: as their `from_pretrained`.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    routes = (folder / CONFIG).exists() and read_json(folder / CONFIG).get("flash_mode")
    return (InternVLFlashConnector if routes else InternVLConnector).from_pretrained(path, device=device)
