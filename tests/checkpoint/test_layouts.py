"""Each layout that is written loads exactly in its own upstream, and elsewhere exactly or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from internvit.checkpoint.load import load_pretrained
from internvit.checkpoint.save import save_pretrained
from internvit.model.vit import InternViT
from internvit.numerics import relative_error
from tests.checkpoint.models import PLAIN, QK_NORM, assert_loaded, make_model

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
hf = pytest.importorskip("internvit.integrations.transformers.model")


def features(model: nn.Module, size: int) -> torch.Tensor:
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(pixels).last_hidden_state


def loads_exactly_or_fails(load, folder: Path, expected: torch.Tensor, size: int) -> bool:
    try:
        loaded = load(folder)
    except (ValueError, OSError, ImportError):  # ImportError: timm is not installed
        return False
    assert relative_error(features(loaded, size), expected) < 1e-4
    return True


@pytest.mark.parametrize("layout", ["opengvlab", "transformers", "timm", "mmseg"])
@pytest.mark.parametrize("shards", ["5GB", "500KB"])
def test_transformers_classes(tmp_path, layout: str, shards: str) -> None:
    model = make_model(PLAIN)
    save_pretrained(model, tmp_path, layout=layout, max_shard_size=shards)
    expected = features(model, 42)
    auto = loads_exactly_or_fails(transformers.AutoModel.from_pretrained, tmp_path, expected, 42)
    assert auto == (layout != "mmseg")
    ours = loads_exactly_or_fails(hf.InternVisionModel.from_pretrained, tmp_path, expected, 42)
    assert ours == (layout == "opengvlab")
    assert_loaded(load_pretrained(InternViT, tmp_path), model.state_dict())


def test_another_layout_says_how_to_convert(tmp_path) -> None:
    save_pretrained(make_model(QK_NORM), tmp_path, layout="transformers")
    with pytest.raises(ValueError, match=r"got the configuration of internvl_vision; .*--to opengvlab"):
        hf.InternVisionModel.from_pretrained(tmp_path)
    save_pretrained(make_model(QK_NORM), tmp_path / "mmseg", layout="mmseg")
    with pytest.raises(ValueError, match="got the configuration of mmseg"):
        hf.InternVisionConfig.from_pretrained(tmp_path / "mmseg")


@pytest.mark.parametrize("fault", ["renamed", "missing", "another layout"])
def test_missing_parameters_are_an_error(tmp_path, fault: str) -> None:
    model = make_model(PLAIN)
    save_pretrained(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    if fault == "renamed":
        weights = {key.replace("ls1", "gamma_1"): value for key, value in weights.items()}
    elif fault == "missing":
        del weights["encoder.layers.1.ls1"]
    else:
        save_pretrained(model, tmp_path / "other", layout="mmseg")
        weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for load in (hf.InternVisionModel.from_pretrained, transformers.AutoModel.from_pretrained):
        with pytest.raises(ValueError, match=r"expected the tower under OpenGVLab's names, e.* missing"):
            load(tmp_path)


def test_timm_reads_its_own_layout(tmp_path) -> None:
    timm = pytest.importorskip("timm", reason="the timm extra is not installed")
    model = make_model(PLAIN)
    save_pretrained(model, tmp_path, layout="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        assert relative_error(theirs.forward_features(pixels), model.eval()(pixels).last_hidden_state) < 1e-4
