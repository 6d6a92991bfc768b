"""Checkpoints from the hub: ids, names, and the shards that are fetched."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from internvit.checkpoint.load import load_pretrained
from internvit.model.vit import InternViT
from tests.checkpoint.models import PLAIN, assert_loaded, names
from tests.support.strategies import random_weights


@pytest.fixture
def hub(saved: Path, tmp_path, monkeypatch) -> list[str]:
    """A hub that serves `saved` as any repository; the list is what was asked for."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(repository: str, *, allow_patterns: list[str], **options) -> str:
        asked.append(f"{repository}@{options['revision']}")
        for path in saved.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                (cache / path.name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_id_and_registry_name(hub: list[str]) -> None:
    for name, repository in (
        ("owner/some-vit", "owner/some-vit"),
        ("internvit-300m-448px", "OpenGVLab/InternViT-300M-448px"),
    ):
        assert_loaded(load_pretrained(InternViT, name, revision="v1"), random_weights(PLAIN))
        assert hub[-1] == f"{repository}@v1"


def test_hub_fetches_only_the_towers_shards(hub: list[str], saved: Path, tmp_path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"vision_model.{key}": name for key, name in index["weight_map"].items()}
    index["weight_map"]["language_model.lm_head.weight"] = "model-language.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in saved.glob("*.safetensors"):
        save_file({f"vision_model.{key}": value for key, value in load_file(shard).items()}, shard)
    (saved / "model-language.safetensors").write_bytes(b"many gigabytes")
    assert_loaded(load_pretrained(InternViT, "owner/whole-internvl"), random_weights(PLAIN))
    assert "model-language.safetensors" not in names(tmp_path / "cache")


@pytest.mark.parametrize("name", ["*", "model-0000?-of-00002.safetensors", "../x", "[a-z]*"])
def test_an_index_cannot_ask_for_every_file(hub: list[str], saved: Path, name: str) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: expected file names of its own folder"):
        load_pretrained(InternViT, "owner/hostile")
    assert len(hub) == 1, "asked once, for the index"


def test_hub_fetches_the_tower_of_a_prefix(hub: list[str], saved: Path, tmp_path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
    both = {f"student.{key}": name for key, name in index.items()} | {
        f"teacher.{key}": "t.safetensors" for key in index
    }
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": both}))
    for shard in saved.glob("*.safetensors"):
        save_file({f"student.{key}": value for key, value in load_file(shard).items()}, shard)
    (saved / "t.safetensors").write_bytes(b"many gigabytes")
    with pytest.raises(ValueError, match="expected one InternViT, got 2"):
        load_pretrained(InternViT, "owner/two")
    assert_loaded(load_pretrained(InternViT, "owner/two", prefix="student."), random_weights(PLAIN))
    assert "t.safetensors" not in names(tmp_path / "cache")


def test_hub_errors(monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        OSError, match=r"OpenGVLab/InternViT-6B-224px could not be fetched .*no network.*give the folder"
    ):
        load_pretrained(InternViT, "internvit-6b-224px")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'internvit\[hub\]', or give a local folder"):
        load_pretrained(InternViT, "internvit-6b-224px")
