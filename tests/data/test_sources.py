"""Sources of bulk extraction: the same images give the same features from wherever they come."""

import io
import os
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file

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


def tar_of(path: Path, members: list[tuple[str, bytes | str, bytes]]) -> Path:
    """A tar of (name, content) with type REGTYPE, or (name, target) with type LNKTYPE or SYMTYPE."""
    with tarfile.open(path, "w") as archive:
        for name, given, kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            content = given if isinstance(given, bytes) else b""
            member.size, member.linkname = len(content), "" if isinstance(given, bytes) else given
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_tar_has_the_files_that_its_extraction_leaves(weights, photos, tmp_path) -> None:
    first, second, third = (photos[i].read_bytes() for i in range(3))
    file, link, symbolic = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE
    path = tar_of(
        tmp_path / "a.tar",
        [
            ("a.png", first, file),
            ("d/b.png", "a.png", link),  # the first content, as it was extracted before the other
            ("d/s.png", "../a.png", symbolic),  # the second, as whoever opens it reads
            ("a.png", "a.png", link),  # what GNU tar writes for a file that it is given twice
            ("./a.png", second, file),
            ("c.png", third, file),
            ("latest", "d/..", symbolic),
            ("through.png", "latest/c.png", symbolic),
            ("none.png", "nowhere.png", link),
            ("loop.png", "loop.png", symbolic),
        ],
    )
    for format in ("parquet", "safetensors"):
        result = run(weights, [path], tmp_path / format, format=format, size=28, batch=1)
        assert (result.images, result.failed) == (7, 2)
        assert len(list((tmp_path / format / "failures").iterdir())) == 1
    errors = table(tmp_path / "parquet", "failures")["error"].to_pylist()
    links = {"none.png": "nowhere.png", "loop.png": "loop.png"}
    assert errors == [f"{path}#{name}: a link to {target}, which is not in the tar" for name, target in links.items()]
    rows = {row["path"].rpartition("#")[2]: row["features"] for row in table(tmp_path / "parquet").to_pylist()}
    assert len(rows) == len(table(tmp_path / "parquet")) == 5
    wanted = run(weights, photos[:3], tmp_path / "wanted", size=28, batch=1) and table(tmp_path / "wanted")["features"]
    for name, index in (("d/b.png", 0), ("d/s.png", 1), ("./a.png", 1), ("c.png", 2), ("through.png", 2)):
        assert rows[name] == wanted[index].as_py(), name
    tensors = load_file(tmp_path / "safetensors" / "data" / "00000000.safetensors")
    assert {name.rpartition("#")[2]: tensor.tolist() for name, tensor in tensors.items()} == {
        f"{name}:features": values for name, values in rows.items()
    }


def test_lists_with_a_byte_order_mark_and_names_with_other_line_ends(photos, tmp_path) -> None:
    names = [tmp_path / name for name in ("a.png", "b\u2028c.png", "d\x0be.png", "f\x85g.png")]
    texts = [end.join([*map(str, names), "", " "]) for end in ("\r\n", "\n", "\r")]
    for data in (texts[0].encode("utf-8-sig"), *(text.encode() for text in texts)):
        (tmp_path / "list.txt").write_bytes(data)
        assert [entry.path for entry in list_sources([str(tmp_path / "list.txt")])] == list(map(str, names))


def test_a_column_is_for_parquet(weights, photos, tmp_path) -> None:
    with pytest.raises(ValueError, match="column: expected Parquet files among the sources, got 'photo' and none"):
        run(weights, photos[:2], tmp_path / "out", column="photo")
    assert not (tmp_path / "out").exists()


def test_output_within_the_sources_is_no_source(weights, photos, tmp_path) -> None:
    for resumed in (0, 30):
        assert run(weights, [tmp_path], tmp_path / "in" / "features").resumed == resumed
