"""An exported program whose weights are replaced by others: an error that names the argument, never a read past it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit.dense.backbone import InternViTBackbone
from internvit.model.vit import InternViT
from tests.support.models import CONFIGS

CONFIG = CONFIGS["tiny-layer_norm"]


class Features(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = InternViT(CONFIG).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels).last_hidden_state


@pytest.fixture(scope="module", params=["model", "backbone"])
def saved(request, tmp_path_factory) -> Path:
    """A program of backend `cpu` in a .pt2 file."""
    module = Features() if request.param == "model" else InternViTBackbone(CONFIG, out_indices=(0, 1)).eval()
    path = tmp_path_factory.mktemp("programs") / f"{request.param}.pt2"
    with torch.no_grad(), internvit.backend("cpu"):
        torch.export.save(torch.export.export(module, (torch.randn(1, 3, *CONFIG.image_hw),)), path)
    return path


def strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, -1)[..., ::2]


def shorter(t: Tensor) -> Tensor:
    return t[: len(t) // 2].clone()


def replaced(path: Path, change: Callable[[Tensor], Tensor], part: str, how: str) -> nn.Module:
    program = torch.export.load(path)
    names = [n for n in program.state_dict if part in n]
    assert names
    if how == "state_dict":
        for name in names:
            program.state_dict[name] = nn.Parameter(change(program.state_dict[name].detach()), requires_grad=False)
        return program.module()
    module = program.module()
    # load_state_dict compares shapes; an attribute is replaced without a question.
    for name in names:
        owner, _, last = name.rpartition(".")
        parameter = getattr(module.get_submodule(owner), last)
        setattr(module.get_submodule(owner), last, nn.Parameter(change(parameter.detach()), requires_grad=False))
    return module


PARTS = ["norm1.weight", "norm2.bias", "ls1"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["state_dict", "attribute"])
@pytest.mark.parametrize("part", PARTS)
def test_shorter_weights_end_in_an_error(saved: Path, part: str, how: str) -> None:
    with (
        torch.no_grad(),
        pytest.raises((RuntimeError, ValueError), match=r"(weight|bias|gamma) must have shape \[96\]"),
    ):
        replaced(saved, shorter, part, how)(torch.randn(1, 3, *CONFIG.image_hw))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", ["state_dict", "attribute"])
@pytest.mark.parametrize("part", PARTS)
def test_weights_of_another_kind_end_in_an_error(saved: Path, part: str, how: str) -> None:
    program = replaced(saved, Tensor.int, part, how)
    with torch.no_grad(), pytest.raises(ValueError, match=r"(weight|bias|gamma) must be float32"):
        program(torch.randn(1, 3, *CONFIG.image_hw))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", [strided, Tensor.double], ids=["strided", "float64"])
@pytest.mark.parametrize("part", ["norm1", "ls1"])
def test_strided_and_wider_weights_compute_the_same(saved: Path, part: str, change: Callable[[Tensor], Tensor]) -> None:
    pixels = torch.randn(1, 3, *CONFIG.image_hw)
    with torch.no_grad():
        expected = torch.export.load(saved).module()(pixels)
        actual = replaced(saved, change, part, "attribute")(pixels)
    torch.testing.assert_close(actual, expected)
