"""Images of several sizes: packed, against one at a time, a batch a size, and padding to the largest size.

    python -m internvit.benchmarks.model.bench_packed --images 64 --layers 2 --dtype bfloat16 --rounds 7
    python -m internvit.benchmarks.model.bench_packed --train --json packed.json

Sizes are from 14 x 14 to 37 x 37 patches, 196 to 1,369. Padded batches are of the largest size: what they cost, their
features are others. Everything else is compared with the images one by one before it is timed. Live memory is what is
held between forward and backward, in storages; peak memory is a call's.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvit import InternViT, InternViTConfig
from internvit.benchmarks.harness.memory import LiveStorages
from internvit.benchmarks.harness.timing import freed_pages_kept, interleaved, peak_bytes
from internvit.benchmarks.model.bench_model import trained_like
from internvit.benchmarks.reports.table import markdown
from internvit.files import atomic_write
from internvit.numerics import relative_error

PACKED, LOOP, BY_SIZE, PADDED = "packed", "one by one", "a batch a size", "padded to the largest"
GRIDS = (
    *((14, 14), (14, 21), (21, 14), (18, 18), (16, 24), (24, 18)),
    *((22, 22), (20, 30), (26, 26), (24, 36), (32, 32), (37, 37)),
)

Images = list[Tensor]
Forward = Callable[[Images], Images]


def photos(count: int, config: InternViTConfig, dtype: torch.dtype, device: str) -> Images:
    """Images of all sizes in turn, in a random order."""
    generator = torch.Generator().manual_seed(0)
    grids = list(itertools.islice(itertools.cycle(GRIDS), count))
    order = torch.randperm(count, generator=generator).tolist()
    sizes = [[side * config.patch_size for side in grids[i]] for i in order]
    return [torch.randn(config.num_channels, *s, generator=generator).to(device, dtype) for s in sizes]


def by_size(model: InternViT, images: Images) -> Images:
    """A batch of each size; the features in the order of the images."""
    places: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        places.setdefault(image.shape, []).append(i)
    features: list[Any] = [None] * len(images)
    for indices in places.values():
        batch = model(torch.stack([images[i] for i in indices])).last_hidden_state
        for i, tokens in zip(indices, batch, strict=True):
            features[i] = tokens
    return features


def padded(model: InternViT, images: Images) -> Images:
    height, width = (max(image.shape[d] for image in images) for d in (1, 2))
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    for image, place in zip(images, batch, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return list(model(batch).last_hidden_state)


def ways(model: InternViT) -> dict[str, Forward]:
    return {
        PACKED: lambda images: list(model(images).last_hidden_state),
        LOOP: lambda images: [model(image[None]).last_hidden_state[0] for image in images],
        BY_SIZE: lambda images: by_size(model, images),
        PADDED: lambda images: padded(model, images),
    }


def backward(model: InternViT, forward: Forward, images: Images) -> None:
    model.zero_grad()
    torch.stack([tokens.float().sum() for tokens in forward(images)]).sum().backward()


def live_bytes(model: InternViT, forward: Forward, images: Images) -> int:
    """Held between forward and backward, features included."""
    with LiveStorages(model) as live:
        features = forward(images)
    held = live.bytes()
    del features
    return held


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    dtype = getattr(torch, arguments.dtype)
    config = InternViTConfig.from_name(arguments.model, num_hidden_layers=arguments.layers, drop_path_rate=0.0)
    model = InternViT(config, device="meta", dtype=dtype)
    weights = {k: v.to(arguments.device, dtype) for k, v in trained_like(config).items()}
    model.load_state_dict(weights, assign=True)
    model.train(arguments.train)
    images = photos(arguments.images, config, dtype, arguments.device)
    forwards = ways(model)
    with torch.set_grad_enabled(arguments.train):
        truth = [tokens.detach() for tokens in forwards[LOOP](images)]
        errors = {
            name: max(relative_error(a.detach(), t) for a, t in zip(forward(images), truth, strict=True))
            for name, forward in forwards.items()
            if name != PADDED
        }
        calls: dict[str, Callable[[], object]] = {
            name: partial(backward, model, f, images) if arguments.train else partial(f, images)
            for name, f in forwards.items()
        }
        memory = {
            name: live_bytes(model, f, images) if arguments.train else peak_bytes(calls[name], arguments.device)
            for name, f in forwards.items()
        }
        with freed_pages_kept():
            *_, times = interleaved(calls, arguments.rounds, 1, arguments.device)
    for name, found in times.items():
        held = memory[name]
        yield {
            "way": name,
            "images/s": arguments.images / found.median,
            "over packed": found.median / times[PACKED].median,
            "p20 ms": 1e3 * found.quantile(20),
            "p80 ms": 1e3 * found.quantile(80),
            "MiB": None if held is None else held / 2**20,
            "error": errors.get(name),
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="internvit-300m-448px")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--train", action="store_true", help="forward and backward")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    found = list(rows(arguments))
    what = "forward and backward" if arguments.train else "forward"
    print(f"{arguments.images} images, {arguments.model}, {arguments.layers} layers, {arguments.dtype}, {what}")
    print(f"{arguments.device}, {torch.get_num_threads()} threads, medians of {arguments.rounds} interleaved rounds\n")
    cells = [[_cell(value) for value in row.values()] for row in found]
    print(markdown(list(found[0]), cells))
    if arguments.json is not None:
        settings = vars(arguments) | {"json": None, "threads": torch.get_num_threads()}
        with atomic_write(arguments.json) as path:
            path.write_text(json.dumps({"settings": settings, "rows": found}, indent=1))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


if __name__ == "__main__":
    main()
