"""Checkpoints by path, by registry name, or from the Hugging Face hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from internvit.checkpoint.files import CONFIG, INDEX, read_index
from internvit.checkpoint.state_dict import conversion_plan
from internvit.config import HUB_IDS


def locate(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    prefix: str | None = None,
) -> Path:
    """A local path as it is; a registry name or a hub id as the folder of the downloaded files.

    Args:
        name_or_path: a file or folder, one of `internvit.config.HUB_IDS`, or a hub id (owner/name).
        revision, cache_dir, token, local_files_only: of the hub.
        prefix: which InternViT is meant: of a whole model only the shards that hold it are fetched.

    Raises:
        FileNotFoundError: no such path, and no hub id.
        OSError: the hub cannot be reached, or has no such repository.
        ImportError: a hub id without huggingface_hub.
        ValueError: an index of shards that is none.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    repository = HUB_IDS.get(str(name_or_path), str(name_or_path))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository) or path.suffix in (".safetensors", ".pth", ".bin", ".pt"):
        raise FileNotFoundError(
            f"name_or_path: {str(name_or_path)!r} is no file or folder, no hub id (owner/name) and none of the names "
            f"{', '.join(HUB_IDS)}"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ImportError(
            f"{repository} is to come from the hub: pip install 'internvit[hub]', or give a local folder"
        ) from error

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
            )
        )

    try:
        return _fetch_weights(fetch, prefix)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise OSError(
            f"{repository} could not be fetched from the hub ({type(error).__name__}: {error}); check the name, the "
            f"network and the token, or download it elsewhere and give the folder"
        ) from error


def _fetch_weights(fetch: Callable[..., Path], prefix: str | None) -> Path:
    folder = fetch(CONFIG, "*.index.json")
    if (folder / INDEX).is_file():  # of a whole InternVL, only the shards that hold the vision tower
        keys = read_index(folder / INDEX)
        plan = conversion_plan(keys, prefix=prefix)
        return fetch(CONFIG, INDEX, *sorted({keys[key] for key in plan.sources()}))
    folder = fetch(CONFIG, "*.safetensors")
    return folder if any(folder.glob("*.safetensors")) else fetch(CONFIG, "*.bin", "*.bin.index.json", "*.pth")
