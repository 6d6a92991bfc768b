"""Sources that change, are damaged, or go by several names: no image gets another's features, and none is left out."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from internvit.data import storage
from internvit.data.bulk import run_local
from internvit.data.sources import absolute, list_sources
from internvit.multimodal.connector import InternVLConnector
from tests.support.folders import command, run, table
from tests.support.photos import write_photos

pa = pytest.importorskip("pyarrow", reason="folders of features are written by pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

COLORS = ("red", "blue", "green", "white")


def bitmap(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(file, "BMP")
    return file.getvalue()


def write_tar(path: Path, colors: tuple[str, ...]) -> None:
    with tarfile.open(path, "w") as archive:
        for color in colors:
            member = tarfile.TarInfo(f"{color}.bmp")
            member.size = len(bitmap(color))
            archive.addfile(member, io.BytesIO(bitmap(color)))


def write_parquet(path: Path, colors: tuple[str, ...]) -> None:
    parquet.write_table(pa.table({"image": list(map(bitmap, colors))}), path)


@pytest.mark.parametrize("moment", ["before the first shard", "while a shard is read"])
@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_an_archive_that_is_rewritten_during_a_run(weights, tmp_path, write, moment) -> None:
    """Members of one size: each image got the features of the one that lay in its place."""
    path = tmp_path / "x.tar" if write is write_tar else tmp_path / "x.parquet"
    write(path, COLORS)
    os.utime(path, ns=(1, 1))

    def engine(job, embedder, shards):
        if moment.startswith("before"):
            write(path, COLORS[::-1])
        else:
            embed = embedder.embed
            embedder.embed = lambda *arguments: (write(path, COLORS[::-1]), embed(*arguments))[1]
        yield from run_local(job, embedder, shards)

    with pytest.raises(ValueError, match=rf"{path.name}: changed, or gone, since this run has listed it"):
        run(weights, [path], tmp_path / "out", engine=engine, size=28, shard=2)
    written = list((tmp_path / "out").glob("data/*"))
    assert len(written) <= (0 if moment.startswith("before") else 1)  # whole before it was rewritten


def test_sparse_members_of_a_tar_fail_by_name(weights, tmp_path) -> None:
    pixels = np.zeros((600, 600, 3), np.uint8)
    pixels[:50], pixels[-50:] = 200, (250, 10, 10)
    Image.fromarray(pixels).save(tmp_path / "plain.bmp")
    subprocess.run(["cp", "--sparse=always", "plain.bmp", "a.bmp"], cwd=tmp_path, check=True)
    subprocess.run(["tar", "-S", "-cf", "x.tar", "a.bmp", "plain.bmp"], cwd=tmp_path, check=True)
    with tarfile.open(tmp_path / "x.tar") as archive:
        if not archive.getmember("a.bmp").issparse():
            pytest.skip("this file system has no sparse files")
    result = run(weights, [tmp_path / "x.tar"], tmp_path / "out", size=28)
    failed = table(tmp_path / "out", "failures").to_pylist()
    assert result.failed == len(failed) >= 1
    assert all("stored sparse" in row["error"] for row in failed)
    run(weights, [tmp_path / "plain.bmp"], tmp_path / "plain", size=28)
    for row in table(tmp_path / "out").to_pylist():
        assert row["features"] == table(tmp_path / "plain")["features"][0].as_py()


def test_globs_go_through_linked_folders(tmp_path) -> None:
    for name in ("train1", "other/deep"):
        write_photos(tmp_path / name, 2, 0)
    (tmp_path / "train2").symlink_to(tmp_path / "other")
    (tmp_path / "train3").symlink_to(tmp_path / "other/deep")
    (tmp_path / "other/deep/loop").symlink_to(tmp_path / "other")

    def names(pattern: str) -> list[str]:
        return [str(Path(entry.path).relative_to(tmp_path)) for entry in list_sources([f"{tmp_path}/{pattern}"])]

    numbers = ("000000.png", "000001.png")
    assert names("train*/*.png") == [f"train{i}/{n}" for i in (1, 3) for n in numbers]
    assert names("train*/**/*.png") == [f"{f}/{n}" for f in ("train1", "train2/deep", "train3") for n in numbers]
    assert names("train2/*/000000.png") == ["train2/deep/000000.png"]
    assert names("**/000000.png") == ["other/deep/000000.png", "train1/000000.png"]


def test_two_dots_after_a_link(tmp_path, monkeypatch) -> None:
    (tmp_path / "deep/real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/real")
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path)
    assert absolute("link/../pics/*.png") == str(tmp_path / "deep/pics/*.png")
    assert absolute("plain/../pics") == str(tmp_path / "pics")
    assert absolute("./link/a.png") == str(tmp_path / "link/a.png")


def test_two_colons_in_local_names(tmp_path) -> None:
    paths = write_photos(tmp_path / "cc::v1", 2, 0)
    paths[0].rename(tmp_path / "cc::v1/10::30.png")
    for source in (tmp_path / "cc::v1", tmp_path / "cc::v1/*.png"):
        assert len(list_sources([str(source)])) == 2


def test_a_name_in_a_list_that_no_file_can_have(weights, photos, tmp_path) -> None:
    (tmp_path / "list.txt").write_text(f"{photos[0]}\nx\0y.png\n")
    assert run(weights, [tmp_path / "list.txt"], tmp_path / "out").failed == 1
    (failure,) = table(tmp_path / "out", "failures").to_pylist()
    assert "y.png: a path has no NUL" in failure["error"]


def test_a_server_on_a_port(weights, photos, tmp_path) -> None:
    pytest.importorskip("fsspec", reason="URLs of http are fsspec's")
    pytest.importorskip("aiohttp", reason="fsspec asks it for http")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "in"))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{path.name}" for path in photos[:3]]
        (tmp_path / "list.txt").write_text("\n".join(urls))
        result = run(weights, [tmp_path / "list.txt"], tmp_path / "out", size=28)
        server.shutdown()
    assert (result.images, result.failed) == (3, 0)


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("hdfs://namenode:8020/photos/a.png", ("hdfs", "namenode:8020", "/photos/a.png", "")),
        ("s3://key:secret@bucket/a.png", ("s3", "key:secret@bucket", "/a.png", "")),
        ("zip://a.png::/x.zip", ("zip", "a.png", "", "::/x.zip")),
        ("zip://p/*.png::http://host:80/x.zip", ("zip", "p", "/*.png", "::http://host:80/x.zip")),
        ("file:///x/a.png", ("file", "", "/x/a.png", "")),
    ],
)
def test_the_parts_of_a_url(url, parts) -> None:
    assert storage._URL.fullmatch(url).groups() == parts


def test_images_keep_their_sizes_beside_a_connector(weights, tmp_path) -> None:
    """An odd number of patches ended the run, at the same image each time."""
    write_photos(tmp_path / "in", 8, 0)
    changes = {"pooling": "connector", "connector": InternVLConnector(64, 48)}
    assert run(weights, [tmp_path / "in"], tmp_path / "out", **changes).failed == 0
    rows = table(tmp_path / "out").to_pylist()
    assert {(row["height"] % 28, row["width"] % 28) for row in rows} == {(0, 0)}
    assert all(len(row["features"]) == row["height"] * row["width"] // 28**2 for row in rows)
    with pytest.raises(ValueError, match=r"size: expected multiples of 28 pixels, .* got 28x42"):
        run(weights, [tmp_path / "in"], tmp_path / "odd", size=(28, 42), **changes)


def damaged(path: Path) -> Path:
    """A Parquet file with a good footer and a page that cannot be read."""
    parquet.write_table(pa.table({"image": list(map(bitmap, COLORS))}), path, compression="none", row_group_size=2)
    content = bytearray(path.read_bytes())
    page = parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[page : page + 6] = b"\xff" * 6
    path.write_bytes(content)
    return path


def test_a_damaged_parquet_file_fails_by_row(weights, photos, tmp_path) -> None:
    """It ended every run, and taken away it was missed for ever."""
    path = damaged(tmp_path / "p.parquet")
    result = run(weights, [*photos[:3], path], tmp_path / "out", shard=2)
    errors = {row["path"]: row["error"] for row in table(tmp_path / "out", "failures").to_pylist()}
    assert result.failed == len(errors) == 2
    assert all(errors[f"{path}#{row}"].startswith(f"{path}#{row}: cannot be read: ") for row in (2, 3))
    path.unlink()
    with pytest.raises(ValueError, match="1 not given, or gone"):  # two of its rows have features
        run(weights, photos[:3], tmp_path / "out", shard=2, retry_failed=True)


def test_an_archive_without_one_good_image_may_go(weights, photos, tmp_path) -> None:
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"image": [b"no image"] * 5}), path)
    assert run(weights, [*photos[:3], path], tmp_path / "out", shard=2).failed == 5
    path.unlink()
    with pytest.raises(ValueError, match="retry_failed"):
        run(weights, photos[:3], tmp_path / "out", shard=2)
    result = run(weights, photos[:3], tmp_path / "out", shard=2, retry_failed=True)
    assert (result.images, result.failed) == (3, 0)
    assert run(weights, photos[:3], tmp_path / "out", shard=2).resumed == 3


def test_a_parquet_file_of_something_else_is_refused_before_anything_is_planned(weights, photos, tmp_path) -> None:
    parquet.write_table(pa.table({"label": [1]}), tmp_path / "meta.parquet")
    with pytest.raises(ValueError, match=r"column: expected one of image, .* in .*meta.parquet, which has label"):
        run(weights, [*photos[:3], tmp_path / "meta.parquet"], tmp_path / "out")
    assert run(weights, photos[:3], tmp_path / "out").images == 3


def test_rows_are_read_from_the_middle_of_a_row_group(weights, photos, tmp_path) -> None:
    good = [path for i, path in enumerate(photos) if i not in (4, 17, 29)]
    content = [{"bytes": path.read_bytes(), "path": None} for path in good for _ in range(6)]
    parquet.write_table(pa.table({"image": content}), tmp_path / "p.parquet")
    run(weights, [tmp_path / "p.parquet"], tmp_path / "out", size=28, shard=50, batch=1)
    run(weights, good, tmp_path / "single", size=28, batch=1)
    wanted = table(tmp_path / "single")["features"].to_pylist()
    rows = table(tmp_path / "out").to_pylist()
    assert [row["path"] for row in rows] == [f"{tmp_path}/p.parquet#{i}" for i in range(162)]
    assert all(row["features"] == wanted[i // 6] for i, row in enumerate(rows))


def test_paths_in_a_column_are_relative_to_its_file(weights, photos, tmp_path, monkeypatch) -> None:
    values = [{"bytes": None, "path": "in/000000.png"}, {"bytes": None, "path": str(photos[1])}]
    parquet.write_table(pa.table({"image": values}), tmp_path / "structs.parquet")
    parquet.write_table(pa.table({"image": ["in/000000.png", str(photos[1])]}), tmp_path / "names.parquet")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("structs", "names"):
        assert run(weights, [f"../{name}.parquet"], tmp_path / name).failed == 0


def test_weights_and_connector_are_seen_from_other_folders(weights, photos, tmp_path, monkeypatch) -> None:
    """Of the connector a worker elsewhere was given the relative path."""
    shutil.copytree(weights, tmp_path / "tower")
    connector = InternVLConnector(64, 48)
    (tmp_path / "connector").mkdir()
    save_file(connector.state_dict(), tmp_path / "connector/model.safetensors")
    (tmp_path / "connector/config.json").write_text('{"downsample_ratio": 0.5, "ps_version": "v2"}')
    monkeypatch.chdir(tmp_path)

    def engine(job, embedder, shards):
        assert job.embedder["name_or_path"] == str(tmp_path / "tower")
        assert job.embedder["connector"] == str(tmp_path / "connector")
        yield from run_local(job, embedder, shards)

    changes = {"pooling": "connector", "connector": "connector", "size": 28}
    assert run("tower", photos[:1], tmp_path / "out", engine=engine, **changes).failed == 0


def test_killed_while_run_json_is_written(weights, photos, tmp_path) -> None:
    """Its unfinished copy was taken for a file of somebody else's, for ever."""
    code = """
import os, signal, sys
from internvit.files import Staging
from tests.support.folders import run
real = os.replace
def replace(source, target, **how):
    if str(target).endswith("run.json"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target, **how)
os.replace = os.rename = replace
run(sys.argv[1], [sys.argv[2]], sys.argv[3])
"""
    arguments = [sys.executable, "-c", code, weights, photos[0], tmp_path / "out"]
    killed = subprocess.run(list(map(str, arguments)), check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "out").iterdir()] != ["run.json"]
    assert run(weights, photos[:1], tmp_path / "out").images == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "plan", "run.json"]


def test_features_are_no_sources_by_whatever_name(weights, photos, tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "in")
    inside = tmp_path / "in/features"
    for source in (tmp_path / "in", tmp_path / "link", f"file://{tmp_path}/in"):
        shutil.rmtree(inside, ignore_errors=True)
        for _ in range(2):
            assert run(weights, [source], inside).images == 30, source
    assert run(weights, [tmp_path / "in"], tmp_path / "in/another").images == 30
    assert run(weights, [inside / "data/*.parquet"], tmp_path / "copy", column="path").images == 27


def test_file_urls_are_locked_as_paths(weights, photos, tmp_path) -> None:
    def engine(job, embedder, shards):
        with pytest.raises(ValueError, match="another process is writing"):
            run(weights, photos, tmp_path / "out")
        yield from run_local(job, embedder, shards)

    assert run(weights, photos, f"file://{tmp_path}/out", engine=engine).images == 30


def test_shards_of_images_that_vary_are_of_many(weights, tmp_path) -> None:
    """A dimension that varies counted as 1024: each image had a file of its own."""
    write_photos(tmp_path / "in", 12, 0)
    run(weights, [tmp_path / "in"], tmp_path / "out", pooling="map", shard=None)
    assert len(list((tmp_path / "out/data").iterdir())) == 1
    with pytest.raises(ValueError, match=r"shard: expected at most \d+ images in a safetensors file, got 520000"):
        run(weights, [tmp_path / "in"], tmp_path / "one", format="safetensors", shard=520000)


def test_a_url_is_for_a_folder(weights, photos, tmp_path) -> None:
    call = command(photos[0], "--weights", weights, "--out", f"file://{tmp_path}/x.safetensors")
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "--out: a URL is for a folder of features" in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("file:*"))
