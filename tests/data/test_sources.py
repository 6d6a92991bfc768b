"""Sources of bulk extraction: the same images give the same features from wherever they come."""

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from internvit.data import storage
from internvit.data.sources import list_sources
from tests.support.folders import run, table

pa = pytest.importorskip("pyarrow", reason="folders of features are written by pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def sources_of_every_kind(folder: Path, photos: list[Path]) -> dict[str, str]:
    """The same images as a glob, a list, a tar, Parquet, a zip and in memory."""
    fsspec = pytest.importorskip("fsspec", reason="URLs of zip and memory are fsspec's")
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive, zipfile.ZipFile(folder / "a.zip", "w") as zipped:
        for path in photos:
            archive.add(path, path.name)
            label = tarfile.TarInfo(f"{path.stem}.json")
            label.size = 2
            archive.addfile(label, io.BytesIO(b"{}"))
            zipped.write(path, f"p/{path.name}")
            fsspec.filesystem("memory").pipe(f"/{folder.parent.name}/x/{path.name}", path.read_bytes())
    images = [{"bytes": p.read_bytes() if i % 2 else None, "path": str(p)} for i, p in enumerate(photos)]
    parquet.write_table(
        pa.table({"label": range(len(photos)), "image": images}), folder / "a.parquet", row_group_size=7
    )
    (folder / "list.txt").write_text("\n".join(map(str, photos)))
    within = photos[0].parent
    return {
        "glob": f"{within}/0000[0-2]?.png",
        "list": str(folder / "list.txt"),
        "tar": str(folder / "a.tar"),
        "parquet": str(folder / "a.parquet"),
        "file": f"file://{within}",
        "zip": f"zip://p/*.png::{folder / 'a.zip'}",
        "local": f"local://{within}/**/*.png",
        "memory": f"memory://{folder.parent.name}/x",
    }


def test_every_kind_of_source_gives_the_same_features(weights, photos, tmp_path) -> None:
    kinds = sources_of_every_kind(tmp_path / "kinds", photos)
    run(weights, [tmp_path / "in"], tmp_path / "out")
    wanted = table(tmp_path / "out")["features"]
    failed = [Path(row["path"]).name for row in table(tmp_path / "out", "failures").to_pylist()]
    for kind, source in kinds.items():
        result = run(weights, [source], tmp_path / kind)
        assert (result.images, result.failed) == (30, 3), kind
        assert table(tmp_path / kind)["features"].equals(wanted), kind
        names = [row["path"] for row in table(tmp_path / kind, "failures").to_pylist()]
        assert (
            names == [f"{source}#{i}" for i in (4, 17, 29)]
            if kind == "parquet"
            else [Path(name.partition("::")[0].rpartition("#")[2]).name for name in names] == failed
        ), kind
    url = f"memory://{tmp_path.name}/features"
    assert run(weights, [tmp_path / "in"], url).resumed == 0
    assert run(weights, [tmp_path / "in"], url).resumed == 30
    assert storage.read_bytes(f"{url}/data/00000000.parquet") == (tmp_path / "out/data/00000000.parquet").read_bytes()


def test_sources_that_are_none(weights, photos, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no image at"):
        list_sources([str(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match="no image at"):
        list_sources([str(tmp_path / "in" / "*.tiff")])
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.tar\.gz: expected a plain \.tar"):
        list_sources([str(tmp_path / "a.tar.gz")])
    with pytest.raises((ValueError, ImportError), match="nothing://x"):
        list_sources(["nothing://x"])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.tar").write_bytes(b"x" * 700)
    (broken / "b.parquet").write_bytes(b"x" * 700)
    os.symlink(tmp_path / "nothing", broken / "c.png")
    (broken / os.fsdecode(b"caf\xe9.png")).write_bytes(photos[0].read_bytes())
    shutil.copy(photos[0], broken / "good.png")
    result = run(weights, [broken], tmp_path / "out")
    assert (result.images, result.failed) == (5, 4)
    errors = table(tmp_path / "out", "failures")["error"].to_pylist()
    for name, reason in (("a.tar", "cannot be read"), ("b.parquet", "cannot be read"), ("c.png", "no such file")):
        assert any(name in error and reason in error for error in errors), name
    assert any("caf\\xe9.png: the name is not UTF-8" in error for error in errors)
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"column: expected one of .* in \S+text\.parquet, which has text"):
        run(weights, [tmp_path / "text.parquet"], tmp_path / "text")


def test_output_within_the_sources_is_no_source(weights, photos, tmp_path) -> None:
    for resumed in (0, 30):
        assert run(weights, [tmp_path], tmp_path / "in" / "features").resumed == resumed
