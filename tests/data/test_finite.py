"""An image whose features are infinite or NaN fails by name, whichever file they would be written to."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import internvit.cli.app
from internvit import InternViT
from internvit.data import Embedder
from internvit.data.extract import extract
from tests.support.folders import run, table
from tests.support.photos import write_photos

REASON = "infinite or NaN, computed in float16; take bfloat16 or float32"


@pytest.fixture
def photos(tmp_path, seed) -> list[Path]:
    return write_photos(tmp_path / "in", 3, seed, sizes=((28, 28),))


@pytest.fixture
def large(weights, tmp_path) -> Path:
    """A tower whose stream is past float16's range."""
    model = InternViT.from_pretrained(weights)
    with torch.no_grad():
        model.encoder.layers[-1].mlp.fc2.bias[3] = 1e6
        model.encoder.layers[-1].ls2.fill_(1)
    return model.save_pretrained(tmp_path / "large")


class OneBroken(InternViT):
    """Gives the second image it sees a NaN."""

    seen = 0

    def forward(self, pixel_values, *args, **settings):
        output = super().forward(pixel_values, *args, **settings)
        for features in output.last_hidden_state:
            self.seen += 1
            if self.seen == 2:
                features[1, 5] = torch.nan
        return output


@pytest.mark.parametrize("pooling", ["class", "mean", "tokens", "map"])
def test_an_embedder_says_why_and_has_no_features(large, photos, pooling) -> None:
    embed = Embedder(large, dtype="float16", pooling=pooling, size=28, device="cpu")
    batch = embed({"path": photos})
    for path, error, features in zip(photos, batch["error"], batch["features"], strict=True):
        assert error.startswith(f"{path}: ")
        assert REASON in error
        assert np.isnan(features).all()
    assert not any(Embedder(large, pooling=pooling, size=28, device="cpu")({"path": photos})["error"])
    with pytest.raises(ValueError, match=r"000000\.png: features that are infinite"):
        Embedder(large, dtype="float16", pooling=pooling, size=28, device="cpu", strict=True)({"path": photos})


@pytest.mark.parametrize("settings", [{"dtype": "float16"}, {"out_dtype": "float16"}])
def test_a_folder_names_it_among_the_failures(large, photos, tmp_path, settings) -> None:
    pytest.importorskip("pyarrow", reason="folders of features are written by pyarrow")
    result = run(large, [tmp_path / "in"], tmp_path / "out", **settings)
    assert (result.images, result.failed) == (3, 3)
    assert len(table(tmp_path / "out")) == 0
    rows = table(tmp_path / "out", "failures").to_pylist()
    assert [row["path"] for row in rows] == list(map(str, photos))
    assert all(row["error"].startswith(f"{row['path']}: features") for row in rows)
    with pytest.raises(ValueError, match=r"000000\.png: features"):
        run(large, [tmp_path / "in"], tmp_path / "strict", strict=True, **settings)


def test_one_file_skips_it(weights, photos, tmp_path, caplog) -> None:
    model = InternViT.from_pretrained(weights)
    model.__class__ = OneBroken
    result = extract(model, photos, tmp_path / "out", (28, 28), batch=2)
    assert result.images == [photos[0], photos[2]]
    assert list(result.skipped) == [photos[1]]
    assert "000001.png: features that are infinite or NaN, computed in float32" in caplog.text
    model.seen = 0
    with pytest.raises(ValueError, match=r"000001\.png: features that are infinite"):
        extract(model, photos, tmp_path / "strict", (28, 28), batch=2, strict=True)


def test_the_command_ends_with_2_where_all_fail(large, photos, tmp_path, capsys, caplog) -> None:
    pytest.importorskip("pyarrow", reason="folders of features are written by pyarrow")
    for out in ("f.safetensors", "folder"):
        call = ["features", tmp_path / "in", "--weights", large, "--dtype", "float16", "--out", tmp_path / out]
        with caplog.at_level(logging.ERROR), pytest.raises(SystemExit) as done:
            internvit.cli.app.run(list(map(str, call)))
        assert done.value.code == 2
        assert "none of 3 " in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "f.safetensors").exists()
