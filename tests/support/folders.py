"""Folders of features as tests write and read them."""

import sys
from pathlib import Path
from typing import Any

from internvit.data import bulk
from internvit.data.bulk import extract_folder


def run(
    weights: Any, sources: Any, out: Any, engine: Any = None, progress: Any = None, **changes: Any
) -> bulk.BulkExtraction:
    """`extract_folder` with images' own sizes in shards of 8; `changes` go to it and to `Embedder`."""
    names = ("format", "shard", "column", "strict", "retry_failed")
    how = {"shard": 8, **{name: changes.pop(name) for name in names if name in changes}}
    embedder = {"name_or_path": weights, "size": "image", "device": "cpu", "batch": 3, **changes}
    watched = {"progress": progress} if progress else {}
    return extract_folder([str(source) for source in sources], str(out), embedder, engine=engine, **how, **watched)


def table(out: Any, part: str = "data") -> Any:
    """All rows of a part of the folder, as any reader of Parquet sees them."""
    from pyarrow import dataset

    return dataset.dataset(str(Path(out) / part), format="parquet").to_table()


def files(out: Any) -> dict[str, bytes]:
    """The content of each file by its name."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(Path(out).rglob("*")) if p.is_file()}


def command(*arguments: object) -> list[str]:
    """`internvit features` in a process of its own."""
    return [sys.executable, "-m", "internvit", "features", *map(str, arguments)]
