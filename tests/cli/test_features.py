"""`internvit features`: what it is given is used, or refused before anything is computed."""

from pathlib import Path

import pytest
from PIL import Image

from internvit import InternViT, InternViTConfig
from internvit.data import extract as extraction
from internvit.data import pca as pictures
from tests.cli.test_app import call, tensors


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    config = InternViTConfig(
        image_size=28, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64
    )
    return InternViT(config).save_pretrained(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def image(tmp_path) -> Path:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


def words(printed: str) -> str:
    return " ".join(printed.split())


def test_a_model_beside_another_network_is_refused(weights, image, tmp_path, capsys) -> None:
    arguments = ("features", image, "--weights", weights, "--model")
    for out in ("o.safetensors", "folder"):
        printed = call(capsys, *arguments, "internvit-300m-448px", "--out", tmp_path / out, code=2)[1]
        assert "--model internvit-300m-448px: expected the network of" in words(printed)
        assert "which has hidden_size 32, not 1024" in words(printed)
    assert list(tmp_path.iterdir()) == [image]


def test_a_model_beside_its_own_network_is_taken(weights, image, tmp_path, capsys, monkeypatch) -> None:
    """Also at another size than the published one, and where there is no config.json."""
    named = InternViTConfig.from_json(weights / "config.json")
    monkeypatch.setattr(InternViTConfig, "from_name", lambda name: named.replace(image_size=56, name=name))
    call(capsys, "features", image, "--weights", weights, "--model", "internvit-300m-448px", "--out", tmp_path / "o/")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes())
    monkeypatch.setattr(InternViTConfig, "from_name", lambda name: named)
    out = tmp_path / "o.safetensors"
    call(capsys, "features", image, "--weights", bare, "--model", "internvit-300m-448px", "--out", out)
    assert len(tensors(out)) == 1


def test_names_of_the_output(weights, image, tmp_path, capsys) -> None:
    arguments = ("features", image, "--weights", weights, "--out")
    assert (
        "--out: expected a .safetensors file or a folder, got an empty name" in call(capsys, *arguments, "", code=2)[1]
    )
    call(capsys, *arguments, tmp_path / "o.SafeTensors")
    assert len(tensors(tmp_path / "o.SafeTensors")) == 1


def test_a_folder_of_failures_alone_ends_with_2(weights, tmp_path, capsys) -> None:
    pytest.importorskip("pyarrow", reason="folders of features are written by pyarrow")
    (tmp_path / "x.png").write_bytes(b"no image")
    out = tmp_path / "o"
    for _ in range(2):  # the second finds it done
        _, printed = call(capsys, "features", tmp_path / "x.png", "--weights", weights, "--out", out, code=2)
        assert f"none of 1 images has features: see {out}/failures" in words(printed)


def test_the_folder_of_a_picture_is_made_first(weights, image, tmp_path, capsys, monkeypatch) -> None:
    made = []
    extract = extraction.extract
    monkeypatch.setattr(
        extraction, "extract", lambda *a, **k: made.append((tmp_path / "new").is_dir()) or extract(*a, **k)
    )
    out = tmp_path / "o.safetensors"
    arguments = ("features", image, "--weights", weights, "--out", out, "--pca")
    printed = call(capsys, *arguments, image / "pca.png", code=2)[1]
    assert "pca.png: cannot be written" in words(printed)
    assert not made
    call(capsys, *arguments, tmp_path / "new" / "pca.png")
    assert made == [True]
    assert (tmp_path / "new" / "pca.png").exists()


def test_a_picture_replaces_none_of_the_images(weights, image, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "draw_pca", lambda *_: pytest.fail("drawn"))
    before = image.read_bytes()
    (tmp_path / "link.png").hardlink_to(image)
    out = tmp_path / "o.safetensors"
    for name in ("a.png", "link.png"):
        printed = call(
            capsys,
            "features",
            image,
            "--weights",
            weights,
            "--out",
            out,
            "--pca",
            tmp_path / name,
            "--overwrite",
            code=2,
        )[1]
        assert f"{name}: is one of the images" in words(printed)
    assert image.read_bytes() == before
    assert not out.exists()
