"""Seconds of vLLM's vision tower and of the plug-in's in its place, in two engines of one process.

    python -m internvit.benchmarks.model.vllm_encoder [--layers 4] [--tiles 1 4] [--rounds 7]

InternViT-300M's width at 448 px in bfloat16 with random weights, in both formats. A round calls each tower once, in
turn, on the same tiles. The folders of models and the engines come from tests, so run it in a checkout.
"""

import argparse
import importlib
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from internvit import InternViTConfig
from internvit.benchmarks.harness.timing import interleaved

FOLDERS = "tests.support.vllm_folders"


def compare(folder: Path, layout: str, layers: int, tiles: list[int], rounds: int) -> list[str]:
    """A line a number of tiles: median milliseconds with vLLM's tower and with ours, and their ratio."""
    engines, folders = (importlib.import_module(name) for name in ("tests.integrations.vllm.engines", FOLDERS))
    config = InternViTConfig.from_name("internvit-300m-448px", num_hidden_layers=layers, drop_path_rate=0.0)
    folders.write_model(folder / layout, layout, config, torch.bfloat16, seed=0)
    settings = {"dtype": "bfloat16", "max_model_len": 8192}
    lines = []
    with (
        engines.engine(folder / layout, False, **settings) as plain,
        engines.engine(folder / layout, True, **settings) as ours,
    ):
        for count in tiles:
            pixels = torch.randn(count, 3, *config.image_hw).bfloat16()
            calls: dict[str, Callable[[], object]] = {
                "plain": partial(engines.features, plain, pixels),
                "ours": partial(engines.features, ours, pixels),
            }
            *_, times = interleaved(calls, rounds)
            before, after = (times[name].median * 1e3 for name in calls)
            spread = sorted(a / b for a, b in zip(times["plain"].seconds, times["ours"].seconds, strict=True))
            lines.append(
                f"| {layout} | {count} | {before:.0f} | {after:.0f} | {before / after:.2f} "
                f"({spread[0]:.2f} to {spread[-1]:.2f}) |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    environment = importlib.import_module("tests.integrations.vllm.environment")
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(environment.variables(Path(folder) / "cache"))
        lines = [
            line
            for layout in importlib.import_module(FOLDERS).FORMATS
            for line in compare(Path(folder), layout, given.layers, given.tiles, given.rounds)
        ]
    print(f"{given.layers} layers, {torch.get_num_threads()} threads, median of {given.rounds} rounds")
    print("\n".join(["| format | tiles | vLLM, ms | with the plug-in, ms | ratio (rounds) |", "|---|---|---|---|---|"]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
