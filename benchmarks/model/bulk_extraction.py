"""Images/s of bulk extraction beside a plain loop over `Embedder`, on one worker.

    python -m internvit.benchmarks.model.bulk_extraction WEIGHTS FOLDER [--rounds 3] [--engines local,ray]

Runs are interleaved: a round is the loop, one of each engine, and the loop again. Engines are timed from their first
shard to their last, without what starting them takes; of the loop, the first call is not timed. The local engine is
compared by the CPU time of the process as well, which other processes of a loaded machine disturb less.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from internvit.data import Embedder
from internvit.data.bulk import extract_folder, run_local
from internvit.data.ray_engine import run_ray

ENGINES = {"local": run_local, "ray": run_ray}


class Clock(NamedTuple):
    """A moment, and how many images are done."""

    wall: float
    cpu: float
    images: int

    @classmethod
    def now(cls, images: int) -> "Clock":
        return cls(time.perf_counter(), time.process_time(), images)

    def rates(self, end: "Clock") -> tuple[float, float]:
        """Images in a second, and in a second of CPU time of this process."""
        images = end.images - self.images
        return images / (end.wall - self.wall), images / (end.cpu - self.cpu)


def loop_rates(embedder: Embedder, paths: list[str], shard: int) -> tuple[float, float]:
    """Of calls with as many images as a shard has."""
    began = None
    for start in range(0, len(paths), shard):
        embedder({"path": paths[start : start + shard]})
        began = began or Clock.now(start + shard)
    assert began is not None
    return began.rates(Clock.now(len(paths)))


def engine_rates(name: str, settings: dict, folder: Path, shard: int) -> tuple[float, float]:
    """Between an engine's first file and its last, by the files' times: Ray hands results over several at once."""
    clocks: list[Clock] = []

    def engine(job, embedder, shards):
        yield from ENGINES[name](job, embedder, shards, workers=1)

    with tempfile.TemporaryDirectory() as out:
        extract_folder(
            [str(folder)],
            out,
            settings,
            shard=shard,
            engine=engine,
            progress=lambda result, total: clocks.append(Clock.now(result.images)),
        )
        times = sorted(path.stat().st_mtime for path in (Path(out) / "data").iterdir())
    images = clocks[-1].images - shard
    return images / (times[-1] - times[0]), clocks[1].rates(clocks[-1])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("weights")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--shard", type=int, default=200)
    parser.add_argument("--engines", default="local,ray")
    given = parser.parse_args()
    settings = {"name_or_path": given.weights, "size": "image", "batch": given.batch}
    paths = sorted(str(path) for path in given.folder.iterdir())
    embedder = Embedder(**settings)
    ratios: dict[str, list[float]] = {}
    for number in range(given.rounds):
        before = loop_rates(embedder, paths, given.shard)
        rates = {name: engine_rates(name, settings, given.folder, given.shard) for name in given.engines.split(",")}
        after = loop_rates(embedder, paths, given.shard)
        wall, cpu = (statistics.mean(pair) for pair in zip(before, after, strict=True))
        print(f"round {number}: loop {before[0]:.1f} and {after[0]:.1f} images/s")
        for name, (wall_rate, cpu_rate) in rates.items():
            print(f"  {name}: {wall_rate:.1f} images/s")
            ratios.setdefault(f"{name}, wall time", []).append(wall_rate / wall)
            if name == "local":
                ratios.setdefault("local, CPU time", []).append(cpu_rate / cpu)
    for name, values in ratios.items():
        print(f"{name}: {statistics.median(values):.3f} of the loop, median of {len(values)}, {len(paths)} images")


if __name__ == "__main__":
    main()
