"""The composed data set and the pieces of the real run; a short run of it, in `make test-all`."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from internvit.dense.segmentation import find_pairs
from internvit.dense.segmentation.folder import read_pair
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "examples" / "segmentation"))
pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
pytest.importorskip("sklearn", reason="scikit-learn, whose digits are pasted, is not installed")
import composed


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("composed")
    counts = composed.COUNTS
    composed.COUNTS = {"training": 12, "validation": 6}
    try:
        composed.compose(folder)
    finally:
        composed.COUNTS = counts
    return folder


def pairs(data: Path, split: str):
    return find_pairs(data / "images" / split, data / "annotations" / split, len(composed.NAMES)).pairs


def test_composed_pictures_hold_what_they_say(data) -> None:
    assert [len(pairs(data, split)) for split in ("training", "validation")] == [12, 6]
    assert (data / "classes.txt").read_text().split() == list(composed.NAMES)
    seen = np.zeros(6, bool)
    for pair in pairs(data, "training"):
        image, classes = read_pair(pair, 6)
        assert image.shape == (224, 224, 3)
        assert (image == image[..., :1]).all()
        present = np.unique(classes)
        assert 1 <= (present < 3).sum() <= 2  # textures
        seen[present] = True
    assert seen.all()


def test_composing_again_gives_the_same_pictures(data, tmp_path) -> None:
    image, classes = composed.Sources("validation").picture(np.random.default_rng([0, len("validation"), 0]))
    stored = read_pair(pairs(data, "validation")[0], 6)
    assert np.array_equal(image, stored[0])
    assert np.array_equal(classes, stored[1])


def test_splits_share_no_texture_coin_or_digit() -> None:
    training, validation = composed.Sources("training"), composed.Sources("validation")
    whole = len(composed.coins())
    assert len(training.coins) + len(validation.coins) == whole > 15
    assert len(training.digits) + len(validation.digits) == 1797
    for a, b in zip(training.textures, validation.textures, strict=True):
        assert a.shape[1] + b.shape[1] <= 512 - 12


@pytest.mark.slow
def test_a_short_real_run(tmp_path, monkeypatch, capsys) -> None:
    """Trained features beat random ones and the constant; both backends have one curve; pictures are drawn."""
    pytest.importorskip("onnx", reason="the trained network is read from an ONNX file")
    torch.use_deterministic_algorithms(False)
    import json

    import real_run

    monkeypatch.setattr(composed, "COUNTS", {"training": 40, "validation": 12})
    monkeypatch.setattr(real_run, "STEPS", {"linear": 60, "upernet": 10})
    real_run.main([str(tmp_path / "work"), str(tmp_path)], standalone_mode=False)
    results = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "work" / "results").glob("*.json")}
    trained, untrained = results["trained-linear"]["miou"], results["random-linear"]["miou"]
    assert trained > untrained + 0.1
    # 0.5 points after a whole run; few pictures and steps move the score more.
    assert abs(results["int8-linear"]["miou"] - results["bf16-linear"]["miou"]) < 0.02
    losses = [np.array(results[f"{name}-linear"]["losses"]) for name in ("trained", "reference")]
    assert np.abs(losses[0] - losses[1]).max() < 1e-3
    assert all(r["assembled"] > 0.999 for r in results.values())
    assert (tmp_path / "segmentation.png").exists()
    assert (tmp_path / "segmentation-curves.png").exists()
    assert "| none | the most frequent class |" in capsys.readouterr().out
