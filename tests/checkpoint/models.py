"""The models that checkpoint tests save and load, and how they are compared."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from internvit.config import InternViTConfig
from internvit.model.vit import InternViT
from tests.support.strategies import random_weights

QK_NORM = InternViTConfig(
    image_size=28, hidden_size=256, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
)
PLAIN = QK_NORM.replace(
    norm_type="layer_norm", qkv_bias=True, qk_normalization=False, num_attention_heads=4, image_size=42
)
CONFIGS = pytest.mark.parametrize("config", [QK_NORM, PLAIN], ids=["qk_norm", "plain"])


def make_model(config: InternViTConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> InternViT:
    model = InternViT(config, dtype=dtype)
    model.load_state_dict(random_weights(config, dtype, seed))
    return model


def assert_loaded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for name, tensor in weights.items():
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
