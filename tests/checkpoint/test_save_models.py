"""Models that were wrapped, compiled or quantised before they are saved."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from internvit.checkpoint.load import load_pretrained
from internvit.checkpoint.save import save_pretrained
from internvit.model.vit import InternViT
from tests.checkpoint.models import PLAIN, assert_loaded, make_model, names
from tests.support.strategies import random_weights


class Wrapped(nn.Module):
    """As FSDP's and DataParallel's wrappers: the module under a name of its own."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, module)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["opengvlab", "transformers"])
@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        checkpoint_wrapper,
        lambda block: torch.compile(checkpoint_wrapper(block)),
        lambda block: Wrapped(block, "_fsdp_wrapped_module"),
        lambda block: Wrapped(block, "module"),
    ],
    ids=["compile", "checkpoint_wrapper", "both", "FSDP", "DataParallel"],
)
def test_blocks_wrapped_one_by_one(tmp_path, wrap, layout: str) -> None:
    model = make_model(PLAIN)
    model.encoder.layers[1] = wrap(model.encoder.layers[1])
    model.encoder.layers[0].mlp.fc1 = wrap(model.encoder.layers[0].mlp.fc1)
    save_pretrained(model, tmp_path, layout=layout)
    assert_loaded(load_pretrained(InternViT, tmp_path), random_weights(PLAIN))


def test_a_whole_compiled_model(tmp_path) -> None:
    save_pretrained(torch.compile(make_model(PLAIN)), tmp_path)
    assert_loaded(load_pretrained(InternViT, tmp_path), random_weights(PLAIN))
    with pytest.raises(ValueError, match="expected its config to be an InternViTConfig, got NoneType"):
        save_pretrained(nn.DataParallel(make_model(PLAIN)), tmp_path, overwrite=True)


@pytest.mark.parametrize("layout", ["opengvlab", "transformers"])
def test_a_torchao_model_is_refused_by_name(tmp_path, layout: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = make_model(PLAIN)
    quantization.quantize_(model.encoder.layers[1], quantization.Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match=r"model: expected .* in encoder\.layers\.1\..*\.weight: save it before quant"):
        save_pretrained(model, tmp_path / "x", layout=layout)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_weights_are_refused(tmp_path, dtype: torch.dtype) -> None:
    model = make_model(PLAIN)
    model.encoder.layers[0].ls1 = nn.Parameter(torch.zeros(256, dtype=dtype), requires_grad=False)
    with pytest.raises(ValueError, match=f"expected weights in floating point, got {dtype} in encoder.layers.0.ls1"):
        save_pretrained(model, tmp_path)
    assert names(tmp_path) == set()
