"""Folders of features: each image once whatever is killed, other settings and sources refused."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import internvit.cli.app
from internvit import InternViT
from internvit.data import storage
from internvit.data.bulk import run_local
from internvit.files import Staging
from internvit.images import load_pixels
from tests.support.folders import command, files, run, table
from tests.support.photos import SIZES, write_photos

pa = pytest.importorskip("pyarrow", reason="folders of features are written by pyarrow")


def stopping(after: int):
    """The local engine, interrupted after some shards."""

    def engine(job, embedder, shards):
        yield from itertools.islice(run_local(job, embedder, shards), after)
        raise KeyboardInterrupt

    return engine


def counting(indices: list[int]):
    """The local engine, and which shards it computed."""

    def engine(job, embedder, shards):
        for done in run_local(job, embedder, shards):
            indices.append(done.index)
            yield done

    return engine


def test_each_image_once_with_the_models_bits_and_failed_ones_named(weights, photos, tmp_path) -> None:
    seen = []
    result = run(weights, [tmp_path / "in"], tmp_path / "out", progress=lambda r, total: seen.append((r.images, total)))
    assert (result.images, result.resumed, result.failed) == (30, 0, 3)
    assert seen == [(0, 30), (8, 30), (16, 30), (24, 30), (30, 30)]
    rows = table(tmp_path / "out")
    good = [path for i, path in enumerate(photos) if i not in (4, 17, 29)]
    assert rows["path"].to_pylist() == [str(path) for path in good]
    model = internvit.optimize_for_inference(InternViT.from_pretrained(weights))
    for row in rows.to_pylist():
        with torch.inference_mode():
            wanted = model(load_pixels(row["path"], (row["height"], row["width"]))[None]).pooler_output[0]
        assert torch.equal(torch.tensor(row["features"]), wanted)
    assert {(row["height"], row["width"]) for row in rows.to_pylist()} == set(SIZES)
    assert rows.schema.field("features").type == pa.list_(pa.float32(), 64)
    assert set(rows["model"].to_pylist()) == {str(weights)}
    assert len(set(rows["fingerprint"].to_pylist())) == 1
    failures = table(tmp_path / "out", "failures").to_pylist()
    assert [row["path"] for row in failures] == [str(photos[i]) for i in (4, 17, 29)]
    assert all(row["error"].startswith(row["path"]) for row in failures)


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_a_rerun_computes_what_is_missing_and_nothing_twice(weights, photos, tmp_path, format) -> None:
    run(weights, [tmp_path / "in"], tmp_path / "whole", format=format)
    with pytest.raises(KeyboardInterrupt):
        run(weights, [tmp_path / "in"], tmp_path / "out", engine=stopping(2), format=format)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    assert len(before) == 2
    indices: list[int] = []
    result = run(weights, [tmp_path / "in"], tmp_path / "out", engine=counting(indices), format=format)
    assert (result.images, result.resumed, result.failed, indices) == (30, 16, 3, [2, 3])
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    result = run(weights, [tmp_path / "in"], tmp_path / "out", engine=counting(indices), format=format)
    assert (result.resumed, result.failed, len(indices)) == (30, 3, 2)


@pytest.mark.parametrize("format", ["parquet", "safetensors"])
def test_a_file_that_is_not_whole_is_no_shard(weights, photos, tmp_path, format) -> None:
    run(weights, [tmp_path / "in"], tmp_path / "out", format=format)
    whole = files(tmp_path / "out")
    first, second, third, fourth = sorted((tmp_path / "out" / "data").iterdir())
    first.write_bytes(first.read_bytes()[:-9])
    second.write_bytes(b"")
    third.write_bytes(os.urandom(500))
    half = tmp_path / "out" / "data" / f".{fourth.name}.0.writing" / "files"
    half.mkdir(parents=True)  # a killed process leaves it
    (half.parent / "lock").touch()
    (half / fourth.name).write_bytes(fourth.read_bytes()[:300])
    fourth.unlink()
    indices: list[int] = []
    assert run(weights, [tmp_path / "in"], tmp_path / "out", engine=counting(indices), format=format).resumed == 0
    assert indices == [0, 1, 2, 3]
    assert files(tmp_path / "out") == whole


def test_readers_see_no_half_written_shard(weights, photos, tmp_path, monkeypatch) -> None:
    """What a reader of the folder finds at the worst moment: each file is whole, and written, and has no name yet."""
    seen = []
    publish = Staging.publish

    def watch(self, names):
        if (tmp_path / "out" / "data").is_dir() and any((tmp_path / "out" / "data").glob("*.parquet")):
            seen.append(len(table(tmp_path / "out")))
        publish(self, names)

    monkeypatch.setattr(Staging, "publish", watch)
    run(weights, photos[5:13], tmp_path / "out", shard=2)
    assert seen == [2, 4, 6]


def test_other_settings_are_refused_and_named(weights, photos, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(weights, [tmp_path / "in"], tmp_path / "out", engine=stopping(1))
    before = files(tmp_path / "out")
    model = InternViT.from_pretrained(weights)
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc2.bias[3] += 2**-20
    other = model.save_pretrained(tmp_path / "other")
    for changes, message in (
        (dict(name_or_path=other), r"weights_digest was \w+, is \w+\)"),
        (dict(size=28), r"\(size was image, is 28x28\)"),
        (dict(pooling="mean", layers=(0,)), r"\(layers was last, is 0; pooling was class, is mean\)"),
        (dict(dtype="bfloat16"), r"dtype was float32, is bfloat16"),
        (dict(format="safetensors"), r"\(format was parquet, is safetensors\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(weights, [tmp_path / "in"], tmp_path / "out", **changes)
    assert files(tmp_path / "out") == before
    assert run(weights, [tmp_path / "in"], tmp_path / "out", batch=5, shard=3).resumed == 8  # the plan stays


def test_a_shard_of_another_run_is_refused(weights, photos, tmp_path) -> None:
    run(weights, [tmp_path / "in"], tmp_path / "out")
    run(weights, [tmp_path / "in"], tmp_path / "other", pooling="mean")
    shutil.copy(tmp_path / "other" / "data" / "00000001.parquet", tmp_path / "out" / "data" / "00000001.parquet")
    with pytest.raises(ValueError, match=r"00000001\.parquet: of a run with other settings"):
        run(weights, [tmp_path / "in"], tmp_path / "out")


def test_sources_that_changed_are_refused_and_new_ones_added(weights, photos, tmp_path, seed) -> None:
    run(weights, [tmp_path / "in"], tmp_path / "out")
    before = files(tmp_path / "out" / "data")
    more = write_photos(tmp_path / "more", 3, seed + 1)
    shutil.move(more[0], tmp_path / "in" / "000000b.png")
    indices: list[int] = []
    result = run(weights, [tmp_path / "in", tmp_path / "more"], tmp_path / "out", engine=counting(indices))
    assert (result.images, result.resumed, indices) == (33, 30, [4])
    assert before.items() <= files(tmp_path / "out" / "data").items()
    assert len(table(tmp_path / "out")) == 30
    os.utime(photos[3], ns=(0, 0))
    photos[5].unlink()
    with pytest.raises(ValueError, match=r"1 changed \(\S+000003\.png\), 3 not given, or gone \(\S+000005\.png, "):
        run(weights, [tmp_path / "in"], tmp_path / "out")


def test_a_folder_of_somebody_else_stays(weights, photos, tmp_path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="theirs: holds other files"):
        run(weights, [tmp_path / "in"], theirs)
    (theirs / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"run\.json: not written by an extraction"):
        run(weights, [tmp_path / "in"], theirs)
    with pytest.raises(ValueError, match="expected a folder, or nothing, got a file"):
        run(weights, [tmp_path / "in"], theirs / "thesis.txt")
    assert {p.name for p in theirs.iterdir()} == {"thesis.txt", "run.json"}


def test_two_runs_into_one_folder(weights, photos, tmp_path) -> None:
    def engine(job, embedder, shards):
        with pytest.raises(ValueError, match="another process is writing there"):
            run(weights, [tmp_path / "in"], tmp_path / "out")
        yield from run_local(job, embedder, shards)

    assert run(weights, [tmp_path / "in"], tmp_path / "out", engine=engine).images == 30


def test_strict_and_failed_images_tried_again(weights, photos, tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"000004\.png: not an image"):
        run(weights, [tmp_path / "in"], tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict" / "data").exists()
    run(weights, [tmp_path / "in"], tmp_path / "out")
    with pytest.raises(ValueError, match="3 images of an earlier run failed"):
        run(weights, [tmp_path / "in"], tmp_path / "out", strict=True)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "read_bytes", unreachable(photos[9]))
        result = run(weights, [tmp_path / "in"], tmp_path / "network")
    assert result.failed == 4
    indices: list[int] = []
    result = run(weights, [tmp_path / "in"], tmp_path / "network", retry_failed=True, engine=counting(indices))
    assert (indices, result.resumed, result.failed) == ([0, 1, 2, 3], 0, 3)
    assert files(tmp_path / "network") == files(tmp_path / "out")


def test_files_that_failed_may_be_repaired_or_removed(weights, tmp_path, seed) -> None:
    photos = write_photos(tmp_path / "in", 7, seed, broken=(1, 3, 6))
    broken = tmp_path / "in" / "broken.tar"
    broken.write_bytes(b"x" * 700)
    given = dict(weights=weights, sources=[tmp_path / "in"], out=tmp_path / "out", shard=2)
    assert run(**given).failed == 4
    shutil.copy(photos[0], photos[1])
    photos[3].unlink()
    with tarfile.open(broken, "w") as archive:
        archive.add(photos[0], "one.png")
        archive.add(photos[2], "two.png")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=r"2 changed \(.*1 not given.*; retry_failed \(--retry-failed\) accepts those"):
        run(**given)
    content, times = photos[5].read_bytes(), photos[5].stat()
    photos[5].write_bytes(b"no image")  # it has features: nobody knows of which content
    with pytest.raises(ValueError, match=r"1 changed \(\S+000005\.png\); restore them, or give another folder$"):
        run(**given, retry_failed=True)
    photos[5].write_bytes(content)
    os.utime(photos[5], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files(tmp_path / "out") == before
    with pytest.raises(KeyboardInterrupt):
        run(**given, retry_failed=True, engine=stopping(0))
    result = run(**given)  # what was left out of the plan then stays so
    assert (result.images, result.failed) == (8, 1)  # six files and two members
    rows = {row["path"]: row["features"] for row in table(tmp_path / "out").to_pylist()}
    assert rows.keys() == {str(photos[i]) for i in (0, 1, 2, 4, 5)} | {f"{broken}#{n}.png" for n in ("one", "two")}
    assert len(table(tmp_path / "out")) == 7
    assert rows[str(photos[0])] == rows[str(photos[1])] == rows[f"{broken}#one.png"]
    assert table(tmp_path / "out", "failures")["path"].to_pylist() == [str(photos[6])]
    assert run(**given).resumed == 8


def unreachable(path: Path):
    """`read_bytes`, but for one file."""
    read = storage.read_bytes

    def read_bytes(given, *args):
        if given == str(path):
            raise OSError("the network is down")
        return read(given, *args)

    return read_bytes


@pytest.mark.parametrize("pooling", ["tokens", "map"])
@pytest.mark.parametrize("size", [28, "image"])
def test_datasets_reads_it_without_us(weights, photos, tmp_path, pooling, size) -> None:
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    run(weights, photos[:4], tmp_path / "out", pooling=pooling, size=size, layers=(0, 2), out_dtype="float16")
    read = datasets.load_dataset(
        "parquet", data_dir=str(tmp_path / "out" / "data"), split="train", cache_dir=str(tmp_path / "cache")
    )
    rows = table(tmp_path / "out").to_pylist()
    assert len(read) == 4
    for row, wanted in zip(read, rows, strict=True):
        assert np.array_equal(row["features_2"], wanted["features_2"])
        shape = np.array(row["features_2"]).shape
        patches = (row["height"] // 14, row["width"] // 14)
        assert shape == ((1 + patches[0] * patches[1], 64) if pooling == "tokens" else (64, *patches))


def test_killed_by_the_system_and_started_again(weights, photos, tmp_path) -> None:
    run(weights, [tmp_path / "in"], tmp_path / "whole", shard=1)
    call = command(tmp_path / "in", "--weights", weights, "--keep-size", "--shard", 1, "--out", tmp_path / "out")
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(call, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while process.poll() is None and not (tmp_path / "out" / "data" / "00000002.parquet").exists():
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert 2 < len(list((tmp_path / "out" / "data").glob("0*.parquet"))) < 31
    result = run(weights, [tmp_path / "in"], tmp_path / "out", batch=1)
    assert result.resumed > 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_command(weights, photos, tmp_path, capsys) -> None:
    def call(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as done:
            internvit.cli.app.run(["features", *map(str, arguments)])
        streams = capsys.readouterr()
        assert done.value.code == code, streams
        return " ".join((streams.out + streams.err).split())

    given = (tmp_path / "in", "--weights", weights, "--out", tmp_path / "out")
    said = call(*given, "--size", 28, "--shard", 8)
    assert f"images/s: {tmp_path}/out" in said
    assert f"3 failed: {tmp_path}/out/failures" in said
    assert "30 images, 30 of them from an earlier run:" in call(*given, "--size", 28)
    assert "size was 28x28, is 42x42" in call(*given, "--size", 42, code=2)
    assert "goes with --engine ray" in call(*given, "--address", "auto", code=2)
    assert "a folder is never replaced" in call(*given, "--overwrite", code=2)
    assert "--keep-size: not with --size" in call(*given, "--keep-size", "--size", 28, code=2)
    single = call(tmp_path / "in", "--weights", weights, "--out", tmp_path / "o.safetensors", "--shard", 8, code=2)
    assert "--shard: for a folder as --out" in single


def test_what_is_not_installed_is_named(weights, tmp_path, capsys, monkeypatch) -> None:
    for module, arguments, word in (
        ("ray", ["--engine", "ray"], "pip install 'internvit[ray]'"),
        ("pyarrow", [], "pip install 'internvit[data]'"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(SystemExit) as done:
            internvit.cli.app.run(
                ["features", "x", "--weights", str(weights), "--out", str(tmp_path / "o"), *arguments]
            )
        assert done.value.code == 2
        assert word in capsys.readouterr().err
        monkeypatch.undo()
    assert not (tmp_path / "o").exists()
