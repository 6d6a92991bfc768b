"""`internvit export`: from an InternVL folder to a file."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import internvit.cli.app
from internvit.model.vit import InternViT
from internvit.multimodal.connector import InternVLConnector
from tests.support.models import CONFIGS, random_weights

CONFIG = CONFIGS["tiny-layer_norm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An InternVL of OpenGVLab's layout: a tower and a connector of the first version."""
    folder = tmp_path_factory.mktemp("internvl")
    model, connector = InternViT(CONFIG), InternVLConnector(CONFIG.hidden_size, 40, ps_version="v1")
    random_weights(model)
    model.save_pretrained(folder)
    tower = {f"vision_model.{name}": t for name, t in model.state_dict().items()}
    save_file({**tower, **connector.state_dict()}, folder / "model.safetensors")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"ps_version": "v1", "downsample_ratio": 0.5,', 1))
    return folder


def run(capsys, *arguments: object, code: int = 0) -> str:
    with pytest.raises(SystemExit) as exit_info:
        internvit.cli.app.run(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    assert exit_info.value.code == code, captured.out + captured.err
    return captured.out if code == 0 else captured.err


@pytest.mark.sampled(4)  # 8 s
def test_image_tokens_of_an_internvl(folder: Path, tmp_path: Path, capsys) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray((torch.rand(60, 90, 3) * 255).byte().numpy()).save(photo)
    out = tmp_path / "tokens.pt2"
    said = run(capsys, folder, out, "--to", "pt2", "--with-connector", "--size", "56x84", "--image", photo)
    assert "pt2 and PyTorch differ by" in said
    assert "at 56x84" in said
    pixels = torch.randn(2, 3, 56, 84)
    connector = InternVLConnector.from_pretrained(folder)
    assert connector.ps_version == "v1"
    with torch.no_grad():
        expected = connector(InternViT.from_pretrained(folder)(pixels).last_hidden_state, (4, 6))
        (actual,) = torch.export.load(out).module()(pixels)
    torch.testing.assert_close(actual, expected)
    assert "exists" in run(capsys, folder, out, "--to", "pt2", code=2)


def test_wrong_calls_end_in_one_line(folder: Path, tmp_path: Path, capsys) -> None:
    assert "path must end in .onnx" in run(capsys, folder, tmp_path / "model.bin", "--to", "onnx", code=2)
    assert "size must be multiples of 14" in run(
        capsys, folder, tmp_path / "a.pt2", "--to", "pt2", "--size", 57, code=2
    )
    assert "opset=23 is for onnx, got to='pt2'" in run(
        capsys, folder, tmp_path / "a.pt2", "--to", "pt2", "--opset", 23, code=2
    )
    tower = tmp_path / "tower"
    InternViT.from_pretrained(folder).save_pretrained(tower)
    assert "mlp1.*" in run(capsys, tower, tmp_path / "a.pt2", "--to", "pt2", "--with-connector", code=2)
