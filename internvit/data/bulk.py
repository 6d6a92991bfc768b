"""Features of millions of images into a folder of Parquet or safetensors, in one process or on Ray.

The sources are cut into shards once. A shard is decoded, embedded and written by one worker, and its file appears under
its name when it is whole. So a shard is done or not whatever is killed, a rerun computes the shards that are missing,
and one that two workers computed has the same bits.
"""

import contextlib
import hashlib
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from internvit.data import storage
from internvit.data.embedder import Embedder
from internvit.data.plan import update_plan
from internvit.data.preprocess import Preprocessor
from internvit.data.shard_files import FORMATS, Row, ShardFiles
from internvit.data.shards import Item, Shard, check_unchanged, open_shard
from internvit.data.sources import RUN_FILE, RUN_FORMAT, absolute, check_column, list_sources
from internvit.files import locked
from internvit.images import printable

logger = logging.getLogger(__name__)

_SHARD_BYTES = 256 * 2**20  # of features, by which the default number of images a shard is bounded
_SHARD_IMAGES = 256  # 154 MB of pixels at 448 x 448
_SAFETENSORS_IMAGES = 250_000  # the format's header has at most 100 MB: 400 bytes for an image's name and entry


@dataclass(frozen=True)
class Done:
    """A shard that is written."""

    index: int
    images: int
    failed: int


@dataclass(frozen=True)
class Job:
    """What a worker needs; it goes to other processes.

    Attributes:
        embedder: arguments of `Embedder`.
        settings: that the worker's own must agree with.
        preprocess: of the embedder, for workers that only decode.
        files: the output.
        column: of Parquet sources.
        strict: an image that cannot be read is an error.
    """

    embedder: dict[str, Any]
    settings: dict[str, str]
    preprocess: Preprocessor
    files: ShardFiles
    column: str | None
    strict: bool


@dataclass
class BulkExtraction:
    """What `extract_folder` did.

    Attributes:
        out: the folder.
        images: in all shards, failed ones included.
        resumed: of them, in shards that an earlier run had written.
        failed: images without features.
    """

    out: str
    images: int = 0
    resumed: int = 0
    failed: int = 0


Engine = Callable[[Job, Embedder, Sequence[Shard]], Iterator[Done]]
Progress = Callable[[BulkExtraction, int], None]


def extract_folder(
    sources: Iterable[str],
    out: str,
    embedder: dict[str, Any],
    *,
    format: str = "parquet",
    shard: int | None = None,
    column: str | None = None,
    strict: bool = False,
    retry_failed: bool = False,
    engine: "Engine | None" = None,
    remote: bool = False,
    progress: Progress = lambda result, total: None,
) -> BulkExtraction:
    """Writes the features of many images into a folder; interrupted, the same call continues.

    Args:
        sources: files, folders, globs, text lists, Parquet files and tars; see `internvit.data.sources`.
        out: the folder, a path or URL.
        embedder: arguments of `Embedder`.
        format: "parquet" or "safetensors".
        shard: images in a file; by default 256, or fewer whose features have 256 MiB.
        column: of Parquet files, with the images.
        strict: an image that fails is an error, also one of an earlier run.
        retry_failed: compute shards with failed images again; files that failed may have changed, or be gone.
        engine: `run_local` by default; `internvit.data.ray_engine.run_ray`.
        remote: the engine's workers are other machines: of this one no GPU is asked for.
        progress: called with the result so far and the number of all images, at the start and after each shard.

    Raises:
        ValueError: a folder of something else or of a run with other settings or sources (the difference is named), one
            that another run writes to, a setting that `Embedder` refuses, or with strict an image that cannot be read.
        FileNotFoundError: a source that is not there.
        ImportError: pyarrow is not installed.
    """
    _check(format, shard)
    out = absolute(out)
    listed = list_sources(sources, out)
    check_column(column, listed)
    embedder = {**embedder, **{name: _portable(embedder.get(name)) for name in ("name_or_path", "connector")}}
    made = _driver_embedder(embedder) if remote else Embedder(**embedder)
    of_worker = made.settings()
    if remote and embedder.get("device"):
        of_worker["device"] = torch.device(embedder["device"]).type
    with _locked(out):
        settings = {**of_worker, "format": format, "column": str(column)}
        source = printable(made.source)  # a column has to be UTF-8
        files = ShardFiles(out, format, made.columns, made.shape, made.out_dtype, source, _fingerprint(settings))
        _claim(out, settings)
        for part in ("data", "failures", "plan"):
            storage.remove_unfinished(storage.join(out, part))
        shards = update_plan(files, listed, shard or _images_per_shard(made), retry_failed, column)
        result, waiting = _take_up(out, files, shards, retry_failed)
        if strict and result.failed:
            raise ValueError(
                f"{printable(out)}: {result.failed} images of an earlier run failed: see {printable(out)}/failures"
            )
        total = sum(map(len, shards))
        progress(result, total)
        job = Job(embedder, of_worker, made.preprocess, files, column, strict)
        if not waiting:
            return result
        running: Any = (engine or run_local)(job, made, waiting)
        with contextlib.closing(running):  # also after Ctrl-C: no thread decodes on
            for entry in running:
                result.images += entry.images
                result.failed += entry.failed
                progress(result, total)
    return result


def _check(format: str, shard: int | None) -> None:
    storage.import_pyarrow()
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if shard is not None and shard < 1:
        raise ValueError(f"shard: expected at least 1, got {shard}")
    if shard is not None and shard > _SAFETENSORS_IMAGES and format == "safetensors":
        raise ValueError(f"shard: expected at most {_SAFETENSORS_IMAGES} images in a safetensors file, got {shard}")


def _portable(name_or_path: Any) -> Any:
    """A path from the root, for workers with another working directory."""
    local = isinstance(name_or_path, str | Path) and Path(name_or_path).expanduser().exists()
    return absolute(str(name_or_path)) if local else name_or_path


def _driver_embedder(embedder: dict[str, Any]) -> Embedder:
    """For its settings alone: on the CPU, without the copies of weights that a worker on a GPU has no use for."""
    if torch.device(embedder.get("device") or "cpu").type == "cpu":
        return Embedder(**embedder)
    return Embedder(**{**embedder, "device": "cpu", "pack": False})


@contextlib.contextmanager
def _locked(out: str) -> Iterator[None]:
    """One driver at a time, where the file system has locks."""
    if (local := storage.local_path(out)) is None:
        yield
        return
    folder = Path(local)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{printable(out)}: expected a folder, or nothing, got a file")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=False):
        yield


def _fingerprint(settings: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def _images_per_shard(embedder: Embedder) -> int:
    size = embedder.max_features * np.dtype(embedder.out_dtype).itemsize * len(embedder.columns)
    return min(_SHARD_IMAGES, max(1, _SHARD_BYTES // size))


def _claim(out: str, settings: dict[str, str]) -> None:
    """Writes run.json, or compares the settings with those that are there."""
    place = storage.join(out, RUN_FILE)
    there = storage.stat(place) is not None
    if not (there and storage.is_url(out)):  # an object store would list all files
        storage.remove_unfinished(out, RUN_FILE)
    if not there:
        if any(True for _ in storage.walk(out)):
            raise ValueError(f"{printable(out)}: holds other files; give a folder that is empty or not there")
        content = {"format": RUN_FORMAT, "fingerprint": _fingerprint(settings), "settings": settings}
        storage.write_atomically(place, json.dumps(content, indent=1).encode())
        return
    try:
        content = json.loads(storage.read_bytes(place))
        stored = dict(content["settings"]) if content["format"] == RUN_FORMAT else None
    except (ValueError, KeyError, TypeError):
        stored = None
    if stored is None:
        raise ValueError(f"{printable(place)}: not written by an extraction; give another folder")
    difference = differing(stored, settings)
    if difference:
        raise ValueError(
            f"{printable(out)}: features of other settings ({difference}); repeat them, or give another folder"
        )


def differing(stored: dict[str, str], settings: dict[str, str]) -> str:
    """The settings that differ, in words; nothing if none."""
    names = sorted(name for name in stored.keys() | settings.keys() if stored.get(name) != settings.get(name))
    return "; ".join(f"{name} was {stored.get(name, 'nothing')}, is {settings.get(name, 'nothing')}" for name in names)


def _take_up(
    out: str, files: ShardFiles, shards: Sequence[Shard], retry_failed: bool
) -> tuple[BulkExtraction, list[Shard]]:
    """What is there already, and the shards that are missing."""
    result = BulkExtraction(out)
    waiting: list[Shard] = []
    with ThreadPoolExecutor(16) as pool:  # each waits for a file's footer
        for shard, done in zip(shards, pool.map(lambda shard: done_before(files, shard), shards), strict=True):
            if done is None:
                waiting.append(shard)
            elif done.failed and retry_failed:
                storage.remove(files.data(shard.index))
                waiting.append(shard)
            else:
                result.images += done.images
                result.resumed += done.images
                result.failed += done.failed
    return result, waiting


def done_before(files: ShardFiles, shard: Shard) -> Done | None:
    """The shard, if its file is there."""
    return Done(shard.index, len(shard), files.failed(shard.index)) if files.is_done(shard.index) else None


def decode_item(item: Item, preprocess: Preprocessor) -> np.ndarray | str:
    """An image's pixels, or why it has none."""
    try:
        item.path.encode()
        return preprocess(item.load(), item.path)
    except UnicodeEncodeError:
        return f"{printable(item.path)}: the name is not UTF-8, as a column has to be"
    except (ValueError, OSError, ImportError) as error:  # the last: a URL whose library is not here
        return str(error)


def embed_shard(
    job: Job, embedder: Embedder, shard: Shard, paths: Sequence[str], images: Sequence[np.ndarray | str]
) -> Done:
    """Embeds the decoded images of a shard and writes its file."""
    check_unchanged(shard)  # all are read now
    broken = next((image for image in images if isinstance(image, str)), None)
    if job.strict and broken:
        raise ValueError(broken)
    rows: list[Row] = []
    failed: list[tuple[str, str]] = []
    for path, image, features in zip(paths, images, embedder.embed(images, paths), strict=True):
        if isinstance(features, str):
            if job.strict:
                raise ValueError(features)
            failed.append((printable(path), features))
        else:
            assert not isinstance(image, str)
            rows.append(Row(path, (image.shape[1], image.shape[2]), image.shape[0], features))
    job.files.write(shard.index, rows, failed)
    return Done(shard.index, len(paths), len(failed))


@dataclass
class _Decoding:
    """A shard whose images threads decode."""

    shard: Shard
    paths: list[str] = field(default_factory=list)
    images: list["Future[np.ndarray | str]"] = field(default_factory=list)


def run_local(job: Job, embedder: Embedder, shards: Sequence[Shard], workers: int = 4) -> Iterator[Done]:
    """Runs shards in this process: threads decode the next one while the model runs."""
    pool = ThreadPoolExecutor(workers)
    decoding: deque[_Decoding] = deque()

    def start(shard: Shard) -> None:
        items = open_shard(shard, job.column)
        futures = [pool.submit(decode_item, item, job.preprocess) for item in items]
        decoding.append(_Decoding(shard, [item.path for item in items], futures))

    try:
        waiting = iter(shards)
        for shard in waiting:
            start(shard)
            if len(decoding) > 1:
                yield _embed_next(job, embedder, decoding)
        while decoding:
            yield _embed_next(job, embedder, decoding)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _embed_next(job: Job, embedder: Embedder, decoding: "deque[_Decoding]") -> Done:
    next_ = decoding.popleft()
    return embed_shard(job, embedder, next_.shard, next_.paths, [image.result() for image in next_.images])
