"""Saves are atomic, and nothing is overwritten unasked."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from internvit.checkpoint import save as checkpoint
from internvit.checkpoint.load import load_pretrained
from internvit.checkpoint.save import save_pretrained
from internvit.model.vit import InternViT
from tests.checkpoint.models import PLAIN, assert_loaded, make_model, names
from tests.support.strategies import random_weights


def test_weights_are_not_overwritten_unasked(tmp_path) -> None:
    first, second = make_model(PLAIN, seed=1), make_model(PLAIN, seed=2)
    save_pretrained(first, tmp_path)
    with pytest.raises(FileExistsError, match="holds weights; pass overwrite=True to replace them"):
        save_pretrained(second, tmp_path)
    assert_loaded(load_pretrained(InternViT, tmp_path), first.state_dict())
    save_pretrained(second, tmp_path, overwrite=True)
    assert_loaded(load_pretrained(InternViT, tmp_path), second.state_dict())
    for name, is_weights in (("pytorch_model.bin", True), ("x.safetensors", True), ("rng_state.pth", False)):
        (tmp_path / name[:3]).mkdir()
        (tmp_path / name[:3] / name).write_bytes(b"")
        if is_weights:
            with pytest.raises(FileExistsError):
                save_pretrained(first, tmp_path / name[:3])
        else:
            save_pretrained(first, tmp_path / name[:3])


@pytest.mark.parametrize("before", ["5GB", "600KB", "1MB"])
@pytest.mark.parametrize("after", ["5GB", "600KB"])
def test_overwriting_leaves_no_stale_file(tmp_path, before: str, after: str) -> None:
    first, second = make_model(PLAIN, seed=1), make_model(PLAIN, seed=2)
    save_pretrained(first, tmp_path, max_shard_size=before)
    (tmp_path / ".checkpoint.0.writing" / "files").mkdir(parents=True)
    (tmp_path / ".checkpoint.0.writing" / "files" / "0.shard").write_bytes(b"of a save that was killed")
    shard = {"encoder.layers.0.ls1": torch.zeros(256)}
    save_file(shard, tmp_path / "model-3-00001-of-00007.safetensors")  # of a save that was killed later
    (tmp_path / "notes.txt").write_text("not ours")
    save_pretrained(second, tmp_path, max_shard_size=after, overwrite=True)
    expected = {"config.json", "notes.txt"}
    if after == "5GB":
        expected |= {"model.safetensors"}
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        expected |= {"model.safetensors.index.json", *index["weight_map"].values()}
    assert names(tmp_path) == expected
    assert_loaded(load_pretrained(InternViT, tmp_path), second.state_dict())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("before", ["5GB", "600KB"])
@pytest.mark.parametrize("after", ["5GB", "600KB"])
def test_interrupted_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, before: str, after: str) -> None:
    first, second = make_model(PLAIN, seed=1), make_model(PLAIN, seed=2)
    state = {"steps": 0, "fail at": 0}

    def interrupted(real):
        def step(*args, **kwargs):
            state["steps"] += 1
            if state["steps"] == state["fail at"]:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return step

    monkeypatch.setattr(checkpoint, "save_file", interrupted(checkpoint.save_file))
    monkeypatch.setattr(os, "replace", interrupted(os.replace))
    monkeypatch.setattr(os, "fsync", interrupted(os.fsync))
    unlink, unlink_step = Path.unlink, interrupted(Path.unlink)
    monkeypatch.setattr(Path, "unlink", lambda p, **kw: (unlink if p.name == "lock" else unlink_step)(p, **kw))
    outcomes = []
    for fail_at in range(1, 100):
        folder = tmp_path / str(fail_at)
        state |= {"steps": 0, "fail at": 0}
        save_pretrained(first, folder, max_shard_size=before)
        state |= {"steps": 0, "fail at": fail_at}
        try:
            save_pretrained(second, folder, max_shard_size=after, overwrite=True)
        except KeyboardInterrupt:
            pass
        else:
            break
        loaded = load_pretrained(InternViT, folder)
        new = torch.equal(loaded.encoder.layers[0].ls1, second.encoder.layers[0].ls1)
        assert_loaded(loaded, (second if new else first).state_dict())
        assert not [name for name in names(folder) if name.startswith(".")]
        outcomes.append(new)
    assert outcomes == sorted(outcomes)  # old up to some step, new from there on
    assert not outcomes[0]


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make_model(PLAIN), tmp_path)
    assert names(tmp_path) == set()


def test_shared_and_strided_parameters(tmp_path) -> None:
    model = make_model(PLAIN)
    layers = model.encoder.layers
    layers[1].ls1 = layers[0].ls1
    layers[0].mlp.fc1.weight = nn.Parameter(torch.randn(256, 48).t())
    flat = torch.randn(3 * 256)
    layers[0].norm1.weight, layers[0].norm1.bias = nn.Parameter(flat[:256]), nn.Parameter(flat[128:384])
    save_pretrained(model, tmp_path)
    assert_loaded(load_pretrained(InternViT, tmp_path), {k: v.clone() for k, v in model.state_dict().items()})


def test_save_refuses(tmp_path) -> None:
    model = make_model(PLAIN)
    with pytest.raises(ValueError, match="layout: expected one of opengvlab, transformers, timm, mmseg, got 'hf'"):
        save_pretrained(model, tmp_path, layout="hf")
    for size in ("5 parsecs", "", 0, -1, True, 1.5, "0GB"):
        with pytest.raises(ValueError, match="max_shard_size: expected bytes or a string such as '5GB'"):
            save_pretrained(model, tmp_path, max_shard_size=size)
    model.config = PLAIN.replace(num_hidden_layers=3)
    with pytest.raises(ValueError, match="missing keys"):
        save_pretrained(model, tmp_path)
    model.config = {"hidden_size": 256}
    with pytest.raises(ValueError, match="expected its config to be an InternViTConfig, got dict"):
        save_pretrained(model, tmp_path)
    assert names(tmp_path) == set()


def test_sizes() -> None:
    sizes = {"5GB": 5_000_000_000, "500kb": 500_000, "1.5 MiB": 1_572_864, "7B": 7, 12: 12}
    assert {size: checkpoint._bytes(size) for size in sizes} == sizes


def test_without_tqdm(saved: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert_loaded(load_pretrained(InternViT, saved), random_weights(PLAIN))
