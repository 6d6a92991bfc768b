"""Bulk extraction on a local Ray cluster of two nodes: a node is killed, then the driver, and each image is there once.

`make test-ray` installs Ray and runs this. 20,000 images of four sizes, 100 of them broken, through 300M-shaped towers
of two blocks and a trained ViT-S.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internvit.data import Embedder
from internvit.data.bulk import extract_folder
from tests.support import ROOT
from tests.support.folders import command, files, table
from tests.support.models import CONFIGS
from tests.support.photos import save_tower, write_photos

ray = pytest.importorskip("ray", reason="the extra ray is not installed; `make test-ray` installs it")
cluster_utils = pytest.importorskip("ray.cluster_utils")

IMAGES, BROKEN, SHARD = 20_000, 100, 200
SHARDS = IMAGES // SHARD
# One thread in each process: bits of float32 GEMMs depend on it.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module", autouse=True)
def no_tokens() -> Iterator[None]:
    """A cluster of this process that others connect to, without a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


@pytest.fixture
def cluster() -> Iterator[Any]:
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder, and the paths of the broken ones."""
    folder = tmp_path_factory.mktemp("photos") / "in"
    random = np.random.default_rng(0)
    broken = sorted(random.choice(IMAGES, BROKEN, replace=False).tolist())
    paths = write_photos(folder, IMAGES, 0, broken=broken)
    return folder, [str(paths[i]) for i in broken]


def two_blocks(folder: Path) -> Path:
    return save_tower(folder, CONFIGS["300m-2-layers"])


def trained_vit_s(folder: Path) -> Path:
    pytest.importorskip("onnx", reason="the trained ViT-S is an ONNX file")
    sys.path.insert(0, str(ROOT / "examples"))
    import trained_vit_s as trained

    from internvit import InternViT

    state, _ = trained.convert(trained.load_graph())
    model = InternViT(trained.CONFIG)
    model.load_state_dict(state)
    return model.save_pretrained(folder)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    end = time.monotonic() + 3000
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("tower", [two_blocks, trained_vit_s])
def test_a_node_and_the_driver_are_killed(tower, photos, cluster, tmp_path) -> None:
    folder, broken = photos
    weights = tower(tmp_path / "weights")
    settings = (folder, "--weights", weights, "--keep-size", "--batch", 32, "--shard", SHARD)
    subprocess.run(command(*settings, "--out", tmp_path / "whole"), check=True, env=ENVIRONMENT)

    out = tmp_path / "out"
    call = command(*settings, "--out", out, "--engine", "ray", "--address", cluster.address)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT}

    def written() -> int:
        return len(list((out / "data").glob("0*.parquet")))

    node = cluster.add_node(num_cpus=2)
    driver = subprocess.Popen(call, **pipes)
    wait_for(lambda: written() >= SHARDS // 5, driver)
    cluster.remove_node(node, allow_graceful=False)
    at_node = written()
    wait_for(lambda: written() >= at_node + SHARDS // 7, driver)  # it goes on with one node
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    at_driver = written()
    assert at_driver < SHARDS
    before = {path: path.stat().st_mtime_ns for path in (out / "data").glob("0*.parquet")}

    cluster.add_node(num_cpus=2)
    done = subprocess.run(call, **pipes)
    assert done.returncode == 0, done.stderr
    print(f"shards at the node's end {at_node}, at the driver's {at_driver}; then: {done.stdout}")
    resumed = int(done.stdout.split(" images, ")[1].split(" ")[0])
    assert resumed >= at_driver * SHARD  # a worker that outlived the driver may have finished its shard
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())

    assert files(out / "data") == files(tmp_path / "whole" / "data")
    assert files(out / "failures") == files(tmp_path / "whole" / "failures")
    paths = table(out)["path"].to_pylist()
    assert sorted(table(out, "failures")["path"].to_pylist()) == broken
    assert len(paths) == IMAGES - BROKEN
    assert {*paths, *broken} == {str(path) for path in folder.iterdir()}

    refused = subprocess.run([*call, "--pooling", "mean"], **pipes)
    assert refused.returncode == 2
    assert "pooling was class, is mean" in " ".join(refused.stderr.split())


def test_strict_and_unreadable_columns_end_in_one_line(cluster, tmp_path) -> None:
    weights = save_tower(tmp_path / "weights")
    write_photos(tmp_path / "in", 8, 0, broken=(3,))
    call = command(tmp_path / "in", "--weights", weights, "--out", tmp_path / "out", "--engine", "ray", "--strict")
    done = subprocess.run([*call, "--address", cluster.address], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2
    last = " ".join(done.stderr.split()).rpartition("internvit: ")[2]
    assert last == f"{tmp_path}/in/000003.png: not an image that Pillow can read"


def test_workers_with_other_weights_are_refused(cluster, tmp_path, monkeypatch) -> None:
    from internvit.data.ray_engine import run_ray

    weights = save_tower(tmp_path / "weights")
    write_photos(tmp_path / "in", 4, 0)

    def engine(job, embedder, shards):
        save_tower(tmp_path / "other")
        for file in (tmp_path / "other").iterdir():
            os.replace(file, weights / file.name)
        yield from run_ray(job, embedder, shards, address=cluster.address)

    embedder = {"name_or_path": weights, "size": 28, "device": "cpu"}
    with pytest.raises(ValueError, match="other weights or settings than the driver: weights_digest was"):
        extract_folder([str(tmp_path / "in")], str(tmp_path / "out"), embedder, engine=engine)


def test_workers_that_cannot_load_the_weights_say_so_in_a_line(cluster, tmp_path) -> None:
    from internvit.data.ray_engine import run_ray

    weights = save_tower(tmp_path / "weights")
    write_photos(tmp_path / "in", 4, 0)

    def engine(job, embedder, shards):
        weights.rename(tmp_path / "elsewhere")
        yield from run_ray(job, embedder, shards, address=cluster.address)

    embedder = {"name_or_path": weights, "size": 28, "device": "cpu"}
    with pytest.raises(ValueError, match=r"a worker cannot load the model: [^\n]*$"):
        extract_folder([str(tmp_path / "in")], str(tmp_path / "out"), embedder, engine=engine)


def test_a_gpu_that_no_node_has_is_not_waited_for(cluster, tmp_path) -> None:
    weights = save_tower(tmp_path / "weights")
    write_photos(tmp_path / "in", 4, 0)
    call = command(tmp_path / "in", "--weights", weights, "--out", tmp_path / "out", "--engine", "ray", "--size", "28")
    call += ["--device", "cuda", "--address", cluster.address]
    done = subprocess.run(call, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == 2
    assert "device: got cuda, but the Ray cluster has no GPU" in " ".join(done.stderr.split())


def test_map_batches_takes_the_embedder(cluster, tmp_path) -> None:
    weights = save_tower(tmp_path / "weights")
    paths = write_photos(tmp_path / "in", 12, 0, broken=(5,))
    ray.init(address=cluster.address, log_to_driver=False)
    rows = ray.data.from_items([{"path": str(path)} for path in paths], override_num_blocks=4)
    settings = {"name_or_path": str(weights), "size": 28, "device": "cpu"}
    embedded = rows.map_batches(
        Embedder,
        fn_constructor_kwargs={**settings, "arrow": True},
        batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    embedded.write_parquet(str(tmp_path / "out"))
    written = {row["path"]: row for row in table(tmp_path, "out").to_pylist()}
    wanted = Embedder(**settings)({"path": paths})
    assert written.keys() == {str(path) for path in paths}
    for path, features, error in zip(paths, wanted["features"], wanted["error"], strict=True):
        row = written[str(path)]
        assert row["error"] == error
        assert row["features"] is None if error else np.allclose(row["features"], features, rtol=0, atol=1e-5)
