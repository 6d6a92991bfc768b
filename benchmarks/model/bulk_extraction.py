"""Images/s of bulk extraction beside a plain loop over `Embedder`, on one worker.

    python -m internvit.benchmarks.model.bulk_extraction WEIGHTS FOLDER [--rounds 3] [--engines local,ray]

Runs are interleaved: a round is one of each. Engines are timed from their first shard to their last, without what
starting them takes; of the loop, the first call is not timed.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from internvit.data import Embedder
from internvit.data.bulk import extract_folder, run_local
from internvit.data.ray_engine import run_ray

SHARD = 200


def plain_loop(embedder: Embedder, paths: list[str]) -> float:
    """Images/s of calls with as many images as a shard has."""
    chunks = [paths[i : i + SHARD] for i in range(0, len(paths), SHARD)]
    embedder({"path": chunks[0]})
    began = time.perf_counter()
    for chunk in chunks[1:]:
        embedder({"path": chunk})
    return (len(paths) - len(chunks[0])) / (time.perf_counter() - began)


def engine_rate(name: str, settings: dict, folder: Path) -> float:
    """Images/s between an engine's first shard and its last."""
    times: list[tuple[float, int]] = []
    run = {"local": run_local, "ray": run_ray}[name]

    def engine(job, embedder, shards):
        yield from run(job, embedder, shards, workers=1)

    def progress(result, total):
        times.append((time.perf_counter(), result.images))

    with tempfile.TemporaryDirectory() as out:
        extract_folder([str(folder)], out, settings, shard=SHARD, engine=engine, progress=progress)
    (began, first), (ended, last) = times[1], times[-1]
    return (last - first) / (ended - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--engines", default="local,ray")
    given = parser.parse_args()
    settings = {"name_or_path": given.weights, "size": "image", "batch": given.batch}
    paths = sorted(str(path) for path in given.folder.iterdir())
    embedder = Embedder(**settings)
    ratios: dict[str, list[float]] = {name: [] for name in given.engines.split(",")}
    for number in range(given.rounds):
        loops = [plain_loop(embedder, paths)]
        rates = {name: engine_rate(name, settings, given.folder) for name in ratios}
        loops.append(plain_loop(embedder, paths))
        loop = statistics.mean(loops)
        for name, rate in rates.items():
            ratios[name].append(rate / loop)
            print(
                f"round {number}: loop {loops[0]:.1f} and {loops[1]:.1f} images/s, {name} {rate:.1f}: {rate / loop:.3f}"
            )
    for name, values in ratios.items():
        print(f"{name}: median ratio {statistics.median(values):.3f} over {len(values)} rounds, {len(paths)} images")


if __name__ == "__main__":
    main()
