"""`extract_folder`'s shards on Ray Data: CPU tasks decode them, actors with the model embed and write them.

A row of the dataset is a shard. Ray Data schedules, holds back the decoders, and repeats what was lost with a process
or a node. That a shard is written once does not depend on it: a worker asks first whether the shard is done, and its
file is renamed into place (`internvit.data.shard_files`). `Dataset.write_parquet` is not used: it writes under the
final names, and of a task that is killed it leaves a half-written file. `DataContext.checkpoint_config` removes such
files at the next start only, and holds the ids of all images in memory to compare them. Ray 2.60.
"""

import logging
import pickle
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch

from internvit.data.bulk import Done, Job, decode_item, differing, done_before, embed_shard
from internvit.data.embedder import Embedder
from internvit.data.shards import Shard, open_shard

_Batch = dict[str, Any]


def import_ray() -> Any:
    """The module ray, with ray.data.

    Raises:
        ImportError: it is not installed; the message says how to get it.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("engine 'ray' needs Ray Data: pip install 'internvit[ray]'; 'local' needs none") from error
    return ray


def run_ray(
    job: Job, embedder: Embedder, shards: Sequence[Shard], address: str | None = None, workers: int | None = None
) -> Iterator[Done]:
    """Runs shards on a Ray cluster; sources, weights and output must be where all nodes see them.

    Args:
        job: what to do.
        embedder: the driver's, which has computed the settings.
        shards: to run.
        address: of a running cluster, or "auto"; by default one is started on this machine.
        workers: actors with a model each; by default one for each GPU, or one for every other CPU.

    Yields:
        shards as they are written, in no order.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # progress is the caller's
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpu = job.settings["device"] == "cuda"
    available = ray.cluster_resources()
    cpus = int(available.get("CPU", 1))
    gpus = int(available.get("GPU", 0))
    if gpu and not gpus and workers is None:
        if started:
            ray.shutdown()
        raise ValueError("device: got cuda, but the Ray cluster has no GPU; give workers to wait for one")
    workers = workers or max(1, gpus if gpu else cpus // 2)
    rows = ray.data.from_items([{"shard": pickle.dumps(shard)} for shard in shards], override_num_blocks=len(shards))
    # An actor on CPUs takes 0.99 of one, a decoder 0.01: when nodes are lost and all actors start again on those that
    # are left, the decoders that they wait for still find room. Their number is bounded instead.
    decoded = rows.map_batches(
        partial(decode_batch, job=job),
        batch_size=1,
        num_cpus=1 if gpu else 0.01,
        compute=ray.data.TaskPoolStrategy(None if gpu else max(1, cpus - workers)),
    )
    written = decoded.map_batches(
        EmbedShards,
        fn_constructor_kwargs={"job": job},
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=0 if gpu else 0.99,
        num_gpus=1 if gpu else None,
    )
    try:
        for row in written.iter_rows():
            if row["error"] is not None:
                raise ValueError(row["error"])
            yield Done(int(row["index"]), int(row["images"]), int(row["failed"]))
    except ray.exceptions.RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise RuntimeError(f"Ray: {lines[-1].strip()}") from error
    finally:
        if started:
            ray.shutdown()


def decode_batch(batch: _Batch, job: Job) -> _Batch:
    """A shard's pixels one after the other, with their shapes or errors; nothing of a shard that is done."""
    shard: Shard = pickle.loads(batch["shard"][0])
    items, problem = [], None
    try:
        items = [] if done_before(job.files, shard) else open_shard(shard, job.column)
    except (ValueError, OSError) as error:  # goes to the driver as a value: Ray would wrap it in its own traces
        problem = str(error)
    images = [decode_item(item, job.preprocess) for item in items]
    pixels = [image.reshape(-1) for image in images if not isinstance(image, str)]
    column = np.empty(1, object)
    column[0] = np.concatenate(pixels) if pixels else np.empty(0, np.uint8)
    described = problem or [image if isinstance(image, str) else image.shape for image in images]
    return {"head": np.array([pickle.dumps((shard, [i.path for i in items], described))], object), "pixels": column}


class EmbedShards:
    """An actor with a model: embeds and writes shards that `decode_batch` has decoded."""

    def __init__(self, job: Job) -> None:
        if job.settings["device"] == "cpu":
            torch.set_num_threads(1)  # bits depend on the number of threads, and must not on the cluster
        self.job = job
        self.problem = ""
        try:
            self.embedder = Embedder(**job.embedder)
        except (ValueError, OSError, ImportError) as error:  # goes to the driver as a value, as in `decode_batch`
            self.problem = f"a worker cannot load the model: {error}"
            return
        if difference := differing(job.settings, self.embedder.settings()):
            self.problem = f"a worker has other weights or settings than the driver: {difference}"

    def __call__(self, batch: _Batch) -> _Batch:
        try:
            shard, paths, described = pickle.loads(batch["head"][0])
            done, error = self._run(shard, paths, described, batch["pixels"][0]), None
        except (ValueError, OSError) as caught:
            done, error = Done(-1, 0, 0), str(caught)
        return {
            **{name: np.array([value]) for name, value in asdict(done).items()},
            "error": np.array([error], object),
        }

    def _run(self, shard: Shard, paths: list[str], described: list[Any] | str, pixels: np.ndarray) -> Done:
        if self.problem:
            raise ValueError(f"{platform.node()}: {self.problem}")
        if isinstance(described, str):
            raise ValueError(described)
        done = done_before(self.job.files, shard)
        return done or embed_shard(self.job, self.embedder, shard, paths, _images(described, pixels))


def _images(described: Sequence[Any], pixels: np.ndarray) -> list[np.ndarray | str]:
    """The images of a shard, as views of its pixels."""
    images: list[np.ndarray | str] = []
    start = 0
    for entry in described:
        if isinstance(entry, str):
            images.append(entry)
            continue
        stop = start + int(np.prod(entry))
        images.append(pixels[start:stop].reshape(entry))
        start = stop
    return images
