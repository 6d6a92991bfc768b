"""examples/segmentation/train.py: killed with SIGKILL, also while it writes, and gone on with, to the same bits."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from internvit import InternViT, InternViTConfig
from tests.dense.test_segmentation_recipe import RECIPE
from tests.support import ROOT
from tests.support.models import random_weights

EXAMPLE = ROOT / "examples" / "segmentation"
sys.path.insert(0, str(EXAMPLE))
pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
import checkpoints  # noqa: E402
import recipe as recipes  # noqa: E402
import train  # noqa: E402

CONFIG = InternViTConfig(
    image_size=56, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
)
# Runs train.py with a torch.save that dies half-way into its n-th file.
DIES_WRITING = """
import os, runpy, signal, sys, torch
save, calls = torch.save, []
def dies(state, file, **settings):
    if settings:  # a tensor that is pickled
        return save(state, file, **settings)
    calls.append(1)
    if len(calls) == {n}:
        import io
        whole = io.BytesIO()
        save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, file)
torch.save = dies
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny tower, a tiny data set and a recipe."""
    folder = tmp_path_factory.mktemp("segmentation")
    model = InternViT(CONFIG)
    random_weights(model)
    model.save_pretrained(folder / "tower")
    rng = np.random.default_rng(0)
    for split, count in (("training", 6), ("validation", 2)):
        for i in range(count):
            image, mask = (folder / "data" / kind / split / f"{i}.png" for kind in ("images", "annotations"))
            for path in (image, mask):
                path.parent.mkdir(parents=True, exist_ok=True)
            classes = np.kron(rng.integers(0, 3, (4, 5)), np.ones((20, 20))).astype(np.uint8)
            noise = rng.integers(0, 60, (*classes.shape, 3))
            Image.fromarray((classes[..., None] * 80 + noise).astype(np.uint8)).save(image)
            Image.fromarray(classes).save(mask)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def command(place: Path, out: str, *more: str) -> list[str]:
    call = [str(EXAMPLE / "train.py"), str(place / "recipe.toml"), "--data", str(place / "data"), "--classes", "3"]
    return [*call, "--out", str(place / out), "--weights", str(place / "tower"), *more]


def start(call: list[str], code: str) -> int:
    """The exit status of a process of its own that runs `code` before the script."""
    process = [sys.executable, "-c", code, *call]
    return subprocess.run(process, capture_output=True, timeout=300, env=environment()).returncode


def run(call: list[str]) -> Result:
    """The script in this process, on one thread as in `environment`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = CliRunner().invoke(train.main, call[1:])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """A run that nobody disturbed."""
    assert "mIoU" in run(command(place, "whole")).stdout
    return place / "whole"


def same(a, b) -> bool:
    """The same nest of dicts, lists and numbers, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def check_same_run(out: Path, whole: Path) -> None:
    ours, expected = (checkpoints.read_checkpoint(p / "checkpoint.pt") for p in (out, whole))
    assert ours["step"] == 9
    for name in expected:
        assert same(ours[name], expected[name]), name
    assert (out / "log.csv").read_text() == (whole / "log.csv").read_text()
    assert (out / "predictions.png").read_bytes() == (whole / "predictions.png").read_bytes()


def test_a_run_leaves_what_it_says(whole) -> None:
    assert sorted(p.name for p in whole.iterdir()) == ["checkpoint.pt", "log.csv", "predictions.png"]
    rows = list(csv.DictReader((whole / "log.csv").open()))
    assert [int(r["step"]) for r in rows] == [*range(1, 10), 9]
    rates = [float(r["lr"]) for r in rows[:9]]
    expected = [1e-3 * (1 - n / 9) * (1 - (1 - n / 3) * (1 - 1e-6) if n < 3 else 1) for n in range(9)]
    assert rates == pytest.approx(expected)  # poly after a linear warm-up, of the head's group
    assert 0 <= float(rows[-1]["miou"]) <= 1
    assert Image.open(whole / "predictions.png").size[0] > 300


@pytest.mark.sampled(3)  # processes that train
def test_killed_while_writing_a_checkpoint(place, whole, caplog) -> None:
    assert start(command(place, "writing"), DIES_WRITING.format(n=3)) == -signal.SIGKILL
    assert list((place / "writing").glob(".*.writing")), "it died half-way"
    previous = torch.load(place / "writing" / "checkpoint.pt", weights_only=True)
    assert previous["step"] == 4
    rows = (place / "writing" / "log.csv").read_text().splitlines()
    assert len(rows) == 1 + 6, "it had got further than its last checkpoint"
    with caplog.at_level("INFO"):
        run(command(place, "writing"))
    assert "going on from step 4" in caplog.text
    assert not list((place / "writing").glob(".*.writing"))
    check_same_run(place / "writing", whole)


@pytest.mark.sampled(2)  # 13 s
def test_killed_at_any_moment(place, whole) -> None:
    """SIGKILL from outside, as soon as there is a checkpoint; with processes that make the samples afterwards."""
    process = subprocess.Popen(
        [sys.executable, *command(place, "outside")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    deadline = time.monotonic() + 300
    while not (place / "outside" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert checkpoints.read_checkpoint(place / "outside" / "checkpoint.pt")["step"] < 9
    run(command(place, "outside", "--workers", "1"))
    check_same_run(place / "outside", whole)


def test_another_recipe_or_other_images_do_not_go_on(place, whole) -> None:
    done = CliRunner().invoke(train.main, command(place, "whole", "--set", "optim.lr=2e-3")[1:])
    assert done.exit_code == 2
    assert "written with other optim.lr; give another --out" in done.output


def test_broken_files_stop_the_run_or_are_counted(place, tmp_path, caplog) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    broken = tmp_path / "data" / "images" / "training" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    call = command(place, "broken", "--set", "optim.steps=1", "--set", "run.evaluate_every=1")
    call[call.index("--data") + 1] = str(tmp_path / "data")
    done = CliRunner().invoke(train.main, call[1:])
    assert done.exit_code == 2
    assert f"train: {broken}: broken image" in done.output
    done = CliRunner().invoke(train.main, [*call[1:], "--broken", "skip"])
    assert done.exit_code == 0, done.output
    assert "training: 5 images, 1 files left out" in done.output
    assert str(broken) in caplog.text


def test_a_file_that_is_no_checkpoint(tmp_path) -> None:
    assert checkpoints.read_checkpoint(tmp_path / "checkpoint.pt") is None
    (tmp_path / "checkpoint.pt").write_bytes(b"PK half a checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: not a checkpoint of this script"):
        checkpoints.read_checkpoint(tmp_path / "checkpoint.pt")


def test_a_frozen_tower_is_not_saved_and_upernet_learns_beside_bfloat16(place) -> None:
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    torch.use_deterministic_algorithms(False)
    changes = ["model.freeze=true", "model.fpn=true", "model.out_indices=[0,1,2,3]", 'model.precision="bfloat16"']
    changes += ['head.kind="upernet"', "head.channels=16", f'model.weights="{place / "tower"}"']
    recipe = recipes.read_recipe(place / "recipe.toml", changes)
    model = recipes.build(recipe, 3, "cpu")
    optimizer, schedule = recipes.optimizer_and_schedule(recipe, model)
    assert model.backbone.encoder.layers[0].attn.qkv.weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        model.loss(torch.randn(2, 3, 56, 56), torch.randint(0, 3, (2, 56, 56))).backward()
        optimizer.step()
        schedule.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    names = train.trained_state(model.state_dict(), recipe).keys()
    assert any(n.startswith("backbone.up1.") for n in names)
    assert not any(n.startswith(("backbone.encoder", "backbone.embeddings")) for n in names)


def refused(place: Path, out: str, *more: str) -> str:
    """The message of a training that ends with exit code 2."""
    done = CliRunner().invoke(train.main, command(place, out, *more)[1:])
    assert done.exit_code == 2, (done.output, done.exception)
    return done.output


def test_bad_inputs_are_named_before_anything_is_loaded(place, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train, "build", lambda *args: pytest.fail("weights were loaded"))
    monkeypatch.setattr(train, "find_pairs", lambda *args: pytest.fail("images were read"))
    for number in ("0", "1", "256", "1000"):
        assert f"num_classes: expected 2 to 255, as masks have 8 bits, got {number}" in refused(
            place, "bad", "--classes", number
        )
    (tmp_path / "names.txt").write_text("cat\n")
    assert "got 1; the background is a class too" in refused(place, "bad", "--classes", str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("cat\ndog\n\ncat\n")
    assert "has cat more than once" in refused(place, "bad", "--classes", str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_text("\n".join(map(str, range(256))))
    assert "got 256" in refused(place, "bad", "--classes", str(tmp_path / "names.txt"))
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe")
    assert "not a text file" in refused(place, "bad", "--classes", str(tmp_path / "names.txt"))
    assert "device: 'foo' cannot be used here" in refused(place, "bad", "--device", "foo")
    assert "'meta' holds no data" in refused(place, "bad", "--device", "meta")
    if not torch.cuda.is_available():
        assert "device: 'cuda' cannot be used here" in refused(place, "bad", "--device", "cuda")
    assert not (place / "bad").exists()


@pytest.mark.parametrize("count", [0, 256, 1000])
def test_the_library_refuses_classes_that_masks_cannot_hold(place, count) -> None:
    from internvit.dense.segmentation import find_pairs, score
    from internvit.dense.segmentation.folder import read_mask

    folders = [place / "data" / kind / "training" for kind in ("images", "annotations")]
    for call in (
        lambda: find_pairs(*folders, count),
        lambda: read_mask(folders[1] / "0.png", count),
        lambda: score([(torch.zeros(2, 2), torch.zeros(2, 2))], count),
    ):
        with pytest.raises(ValueError, match=f"num_classes: expected [12] to 255, as masks have 8 bits, got {count}"):
            call()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_picture_of_somebody_else_is_not_replaced(place, tmp_path, kind, monkeypatch) -> None:
    monkeypatch.setattr(train, "build", lambda *args: pytest.fail("weights were loaded"))
    (tmp_path / "photo.png").write_bytes(b"mine")
    picture = tmp_path / "out" / "predictions.png"
    picture.parent.mkdir()
    picture.write_bytes(b"mine") if kind == "file" else picture.symlink_to(tmp_path / "photo.png")
    output = refused(place, str(tmp_path / "out")).replace("\n", "")
    assert "predictions.png: not a picture of this script" in output
    assert picture.read_bytes() == b"mine"
    assert list(picture.parent.iterdir()) == [picture]


def test_weights_whose_path_has_quotes(place) -> None:
    odd = place / 'a "quoted" \\ tower'
    shutil.copytree(place / "tower", odd)
    call = command(place, "quoted", "--set", "optim.steps=1", "--set", "run.evaluate_every=1")
    call[call.index("--weights") + 1] = str(odd)
    done = CliRunner().invoke(train.main, call[1:])
    assert done.exit_code == 0, done.output


def test_two_trainings_into_one_folder(place) -> None:
    from internvit.files import locked

    (place / "shared").mkdir()
    with locked(place / "shared"):
        assert "shared: another process is writing there" in refused(place, "shared").replace("\n", "")
    assert list((place / "shared").iterdir()) == []


@pytest.mark.sampled(3)  # processes that train
def test_a_full_disk_is_one_line(place) -> None:
    import resource

    done = subprocess.run(
        [sys.executable, *command(place, "full")],
        capture_output=True,
        text=True,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "checkpoint.pt: cannot be written" in done.stderr.replace("\n", "")
    assert not (place / "full" / "checkpoint.pt").exists()
    assert not list((place / "full").glob(".*.writing"))


FROZEN = ("--set", "model.freeze=true", "--set", "optim.steps=4", "--set", "run.evaluate_every=4")


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory) -> Path:
    """A copy of everything, with a run on a frozen tower that was stopped half-way."""
    folder = tmp_path_factory.mktemp("frozen") / "place"
    shutil.copytree(place, folder, ignore=lambda _, names: {"whole", "writing", "outside"} & set(names))
    assert start(command(folder, "out", *FROZEN), DIES_WRITING.format(n=2)) == -signal.SIGKILL
    return folder


@pytest.fixture
def frozen(stopped, tmp_path) -> Iterator[tuple[Path, list[str]]]:
    """It is put back afterwards: a checkpoint names its weights' place."""
    shutil.copytree(stopped, tmp_path / "kept")
    yield stopped, list(FROZEN)
    shutil.rmtree(stopped)
    shutil.copytree(tmp_path / "kept", stopped)


@pytest.mark.sampled(3)  # processes that train
def test_a_resumed_run_refuses_other_data_classes_and_weights(frozen) -> None:
    place, changes = frozen
    mask = place / "data" / "annotations" / "training" / "0.png"
    image = place / "data" / "images" / "validation" / "1.png"
    for path, split in ((mask, "training"), (image, "validation")):
        content, before = path.read_bytes(), path.stat()
        pixels = np.asarray(Image.open(path))
        Image.fromarray(pixels[::-1].copy()).save(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        name = path.relative_to(place / "data")
        assert f"written with other 1 {split} files such as {name};" in refused(place, "out", *changes)
        path.write_bytes(content)
    (place / "names.txt").write_text("a\nb\nc\n")
    assert "written with other the classes" in refused(place, "out", *changes, "--classes", str(place / "names.txt"))
    tower = InternViT.from_pretrained(place / "tower")
    with torch.no_grad():
        tower.encoder.layers[2].norm1.weight[5] += 2**-10
    tower.save_pretrained(place / "tower", overwrite=True)
    assert "written with other the frozen weights" in refused(place, "out", *changes)


@pytest.mark.sampled(2)
def test_a_resumed_run_on_a_frozen_tower_continues(frozen, caplog) -> None:
    place, changes = frozen
    with caplog.at_level("INFO"):
        run(command(place, "out", *changes))
    assert "going on from step 2" in caplog.text


def test_checkpoints_of_something_else(place, whole, tmp_path) -> None:
    state = torch.load(whole / "checkpoint.pt", weights_only=True)
    half = {**state, "model": dict(list(state["model"].items())[:5])}
    shapes = {**state, "model": {n: t[:1] if t.dim() else t for n, t in state["model"].items()}}
    (place / "other").mkdir()
    for content, message in (
        ([1, 2], "expected a dict, got list"),
        (state["model"], "expected dict 'recipe', got nothing"),
        ({n: v for n, v in state.items() if n != "rng"}, "expected dict 'rng', got nothing"),
        ({**state, "step": "4"}, "expected int 'step', got str"),
        (half, "missing or unknown parameters such as"),
        (shapes, "does not fit this run"),
        ({**state, "optimizer": {}}, "does not fit this run"),
        ({**state, "rng": {}}, "does not fit this run"),
    ):
        torch.save(content, place / "other" / "checkpoint.pt")
        output = refused(place, "other")
        assert "checkpoint.pt: " in output
        assert message in output
    (place / "other" / "checkpoint.pt").unlink()
    (place / "other" / "log.csv").write_text("name,price\ntea,2\n")
    assert "log.csv: not a log of this script" in refused(place, "other")
    assert (place / "other" / "log.csv").read_text() == "name,price\ntea,2\n"
