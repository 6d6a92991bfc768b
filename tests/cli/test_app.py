"""The command line as a user meets it: in a process of its own where that makes a difference."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open

import internvit.cli.app
from internvit import InternViT, InternViTConfig
from internvit.data.extract import extract
from internvit.images import load_pixels
from tests.support import ROOT
from tests.support.models import random_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    config = InternViTConfig(
        image_size=56, hidden_size=64, num_attention_heads=2, num_hidden_layers=3, intermediate_size=128
    )
    model = InternViT(config)
    random_weights(model)
    folder = tmp_path_factory.mktemp("weights")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def start(*arguments: object, width: int = 80, **settings) -> subprocess.Popen:
    environment = {**os.environ, "COLUMNS": str(width), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "internvit", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **settings)


def call(capsys, *arguments: object, code: int = 0) -> tuple[str, str]:
    """The command line in this process: the same code after the start, which costs seconds."""
    with pytest.raises(SystemExit) as exit_info:
        internvit.cli.app.run([str(a) for a in arguments])
    stdout, stderr = capsys.readouterr()
    assert exit_info.value.code == code, stdout + stderr
    return stdout, stderr


def run(*arguments: object, code: int = 0, **settings) -> tuple[str, str]:
    process = start(*arguments, **settings)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stdout + stderr
    assert "Traceback" not in stderr
    return stdout, stderr


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layers", [None, "0,-1"])
def test_features_are_the_librarys_to_the_bit(weights, photos, tmp_path, layers, capsys) -> None:
    out = tmp_path / "features.safetensors"
    chosen = ["--layers", layers] if layers else []
    arguments = ("features", photos, "--weights", weights, "--out", out, "--batch", 4, "--size", "56x84", *chosen)
    call(capsys, *arguments) if layers else run(*arguments)
    model = InternViT.from_pretrained(weights)
    features = tensors(out)
    assert len(features) == (12 if layers else 6)
    for path in sorted(photos.iterdir()):
        with torch.inference_mode():
            result = model(load_pixels(path, (56, 84))[None], output_hidden_states=True)
        if layers:
            assert torch.equal(features[f"{path}:0"], result.hidden_states[1][0])
            assert torch.equal(features[f"{path}:-1"], result.last_hidden_state[0])
        else:
            assert torch.equal(features[f"{path}:last"], result.last_hidden_state[0])
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["size"] == "56x84"
        assert InternViTConfig.from_dict(json.loads(file.metadata()["config"])) == model.config
    assert list(tmp_path.iterdir()) == [out]


def test_pca_and_broken_images(weights, photos, tmp_path, capsys) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    arguments = ("features", broken, photos / "0.png", "--weights", weights, "--size", 112)
    stdout, stderr = call(capsys, *arguments, "--out", tmp_path / "a.safetensors", "--pca", tmp_path / "a.png")
    assert "1 images" in stdout
    assert str(broken.name) in stderr.replace("\n", "")
    assert "skipped" in stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 500
    _, stderr = call(capsys, *arguments, "--strict", "--out", tmp_path / "b.safetensors", code=2)
    assert str(broken) in stderr.replace("\n", "")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill -9"])
def test_interrupted_and_taken_up_again(weights, tmp_path, how, capsys) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    random = np.random.default_rng(1)
    for i in range(48):
        Image.fromarray(random.integers(0, 256, (30, 30, 3), np.uint8)).save(folder / f"{i:02}.png")
    out = tmp_path / "features.safetensors"
    arguments = ("features", folder, "--weights", weights, "--out", out, "--size", 448)
    # A shell's background job has Ctrl-C ignored, and hands that on.
    process = start(*arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    partial = tmp_path / "features.safetensors.partial"
    deadline = time.monotonic() + 300
    while len(list(partial.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in stderr
    assert not out.exists(), "it was interrupted before the end"
    left = [p for p in partial.iterdir() if p.suffix == ".safetensors"]
    assert all(tensors(p) for p in left)
    stdout, _ = call(capsys, *arguments)
    assert f"48 images at 448x448, {len(left)} of them from an interrupted run" in stdout
    fresh = tmp_path / "fresh.safetensors"
    call(capsys, "features", folder, "--weights", weights, "--out", fresh, "--size", 448)
    first, second = tensors(out), tensors(fresh)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not partial.exists()


def test_nothing_is_overwritten_silently(weights, photos, tmp_path, capsys) -> None:
    out = tmp_path / "features.safetensors"
    out.write_text("mine")
    arguments = ("features", photos / "0.png", "--weights", weights, "--out", out)
    _, stderr = call(capsys, *arguments, code=2)
    assert "exists" in stderr
    assert out.read_text() == "mine"
    call(capsys, *arguments, "--overwrite")
    assert len(tensors(out)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["features", "nothing.png", "--weights", "w", "--out", "o.safetensors"], "no image at nothing.png"),
        (["features", "x.png", "--out", "o.safetensors"], "name the network"),
        (["features", "x.png", "--weights", "w", "--out", "o.safetensors", "--size", "big"], "expected N or HxW"),
        (
            ["features", "x.png", "--weights", "w", "--out", "o", "--layers", "a"],
            "expected numbers of blocks",
        ),
        (["features", "x.png", "--weights", "w", "--out", "o.npz"], ".safetensors file or a folder, got o.npz"),
        (["plan", "--memory", "much"], "expected a size such as 24GB"),
        (["plan", "--size", "450"], "expected multiples of 14, got 450x450"),
        (["plan", "--devices", "8"], "--devices needs --memory, of each device"),
        (["plan", "--devices", "8", "--memory", "80GB", "--size", "450"], "expected multiples of 14, got 450x450"),
        (["convert", "nowhere", "there", "--to", "timm"], "nowhere"),
        (["convert", "nowhere", "there", "--to", "keras"], "'keras' is not one of"),
        (["nonsense"], "No such command 'nonsense'"),
    ],
)
def test_errors_are_one_clear_line(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, stderr = call(capsys, *arguments, code=2)
    assert message in " ".join(stderr.split())
    assert list(tmp_path.iterdir()) == []


def test_bad_sizes_and_layers_of_a_real_model(weights, photos, tmp_path, capsys) -> None:
    out = tmp_path / "o.safetensors"
    for extra, message in ((("--size", "57"), "multiples of 14"), (("--layers", "3"), "from -3 to 2, got 3")):
        _, stderr = call(capsys, "features", photos / "0.png", "--weights", weights, "--out", out, *extra, code=2)
        assert message in stderr
    assert list(tmp_path.iterdir()) == []


def test_convert_round_trip(weights, tmp_path, capsys) -> None:
    call(capsys, "convert", weights, tmp_path / "hf", "--to", "transformers")
    assert any("lambda_1" in name for name in tensors(tmp_path / "hf" / "model.safetensors"))
    call(capsys, "convert", tmp_path / "hf", tmp_path / "back", "--to", "opengvlab")
    first, second = tensors(weights / "model.safetensors"), tensors(tmp_path / "back" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    _, stderr = call(capsys, "convert", weights, tmp_path / "hf", "--to", "timm", code=2)
    assert "exist" in stderr or "timm" in stderr


@pytest.mark.parametrize("width", [80, 200])
def test_info_and_plan_fit_the_terminal(width, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(internvit.cli.app, "out", Console(soft_wrap=False))  # which reads the width when it is made
    train = ("--train", "--memory", "80GB", "--batch")
    for arguments in (
        ("info",),
        ("plan", "--task", "segmentation", *train, 2),
        ("plan", "--devices", 8, *train, 40),  # the 300M over 8 fits with selective checkpointing
    ):
        stdout, stderr = call(capsys, *arguments)
        longest = max(map(len, stdout.splitlines()))
        assert longest <= width
        assert longest > 80 or width == 80, "the terminal's width was not read"
        assert "…" not in stdout
        assert not stderr
        assert arguments[0] == "info" or re.search(r"\bfits *$", stdout, re.MULTILINE), "the last column is cut off"
    assert "6b-448px-v2.5" in stdout
    assert "take internvit-" in stdout


def test_the_documentation_shows_what_plan_prints(capsys, monkeypatch) -> None:
    monkeypatch.setattr(internvit.cli.app, "out", Console(soft_wrap=False, width=80))
    arguments, shown = re.findall(
        r"\$ internvit (plan --devices.*)\n((?:.*\n)*?)```", (ROOT / "docs" / "scale.md").read_text()
    )[0]
    printed = {line.rstrip() for line in call(capsys, *arguments.split())[0].splitlines()}
    assert {line for line in shown.splitlines() if line != " ..."} <= printed


def test_json_for_scripts(capsys) -> None:
    environment = json.loads(call(capsys, "info", "--json")[0])
    assert environment["versions"]["internvit"] == internvit.__version__
    assert {row["backend"] for row in environment["backends"]} >= {
        "reference",
        "cpu",
        "triton",
        "cuda",
        "sdpa",
        "flash",
    }
    made = json.loads(call(capsys, "plan", "--json", "--memory", "24GB")[0])
    assert made["choice"] == "internvit-6b-448px-v2.5"
    made = json.loads(call(capsys, "plan", "--json", "--devices", 8, "--memory", "8GB")[0])
    assert made["choice"]["layout"] == "TP 2 x DP 4"
    assert {cost["fits"] for cost in made["costs"]} == {True, False}


def test_help_has_examples(capsys) -> None:
    for command in ("features", "check", "plan", "convert"):
        assert "Example" in call(capsys, command, "--help")[0]


def test_extract_checks_its_arguments(weights, tmp_path) -> None:
    model = InternViT.from_pretrained(weights)
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        extract(model, [], tmp_path / "o", (56, 56), batch=0)
    with pytest.raises(ValueError, match="none of 1 files is an image"):
        extract(model, [tmp_path / "absent.png"], tmp_path / "o", (56, 56))
    assert list(tmp_path.iterdir()) == []
