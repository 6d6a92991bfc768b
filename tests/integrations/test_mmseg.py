"""Registration with mmseg. mmseg cannot be installed beside this torch: a stub has its registry's API, no more."""

import importlib
import sys
import types

import pytest
import torch

from internvit import InternViT, InternViTBackbone, InternViTConfig, convert_state_dict
from tests.support.models import random_weights

FIELDS = {
    "image_size": 56,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


class Registry:
    """`register_module` and `build` as mmengine 0.10's Registry has them."""

    def __init__(self) -> None:
        self.modules: dict[str, type] = {}

    def register_module(self, name=None, force=False, module=None) -> type:
        assert force or name not in self.modules
        self.modules[name] = module
        return module

    def build(self, cfg: dict) -> torch.nn.Module:
        cfg = dict(cfg)
        return self.modules[cfg.pop("type")](**cfg)


@pytest.fixture
def registry(monkeypatch) -> Registry:
    stub = types.ModuleType("mmseg.registry")
    stub.MODELS = Registry()
    monkeypatch.setitem(sys.modules, "mmseg", types.ModuleType("mmseg"))
    monkeypatch.setitem(sys.modules, "mmseg.registry", stub)
    monkeypatch.delitem(sys.modules, "internvit.integrations.mmseg", raising=False)
    importlib.import_module("internvit.integrations.mmseg")
    yield stub.MODELS
    sys.modules.pop("internvit.integrations.mmseg", None)


def test_importing_registers(registry) -> None:
    assert list(registry.modules) == ["InternViTBackbone"]
    assert sys.modules["internvit.integrations.mmseg"].register() == ["mmseg.registry"]


def test_a_config_files_values_make_it(registry) -> None:
    cfg = dict(type="InternViTBackbone", config=FIELDS, out_indices=[0, 3], freeze=True, dtype="bfloat16")
    backbone = registry.build({**cfg, "image_size": 70, "drop_path_rate": 0.4})
    assert isinstance(backbone, InternViTBackbone)
    assert backbone.config.image_size == 70
    assert [x.drop_path_rate for x in backbone.encoder.layers] == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    assert [x.dtype for x in backbone(torch.randn(1, 3, 56, 56))] == [torch.float32] * 2
    backbone.init_weights()  # nothing to load
    assert registry.build({**cfg, "patch_size": 16}).config.image_size == 64
    named = {"config": "internvit-300m-448px", "device": "meta", "out_indices": [0], "dtype": None}
    assert registry.build({**cfg, **named}).config.hidden_size == 1024


@pytest.mark.parametrize("how", ["pretrained", "init_cfg"])
@torch.no_grad()
def test_init_weights_loads_an_mmseg_checkpoint(registry, tmp_path, how) -> None:
    config = InternViTConfig(**FIELDS)
    source = InternViTBackbone(config, (0, 1, 2, 3), fpn=True).eval()
    random_weights(source)
    weights = source.state_dict()
    tower = convert_state_dict({k: v for k, v in weights.items() if not k.startswith("up")}, to="mmseg")
    pyramid = {k: v for k, v in weights.items() if k.startswith("up")}
    path = tmp_path / "model.pth"
    torch.save({"module": {**tower, **pyramid}}, path)
    more = (
        {"pretrained": str(path)} if how == "pretrained" else {"init_cfg": {"type": "Pretrained", "checkpoint": path}}
    )
    cfg = dict(type="InternViTBackbone", config=FIELDS, out_indices=[0, 1, 2, 3], fpn=True, image_size=84, **more)
    built = registry.build(cfg).eval()
    built.init_weights()
    pixels = torch.randn(1, 3, 84, 84)
    for a, b in zip(built(pixels), source(pixels), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_that_does_not_fit(registry, tmp_path) -> None:
    InternViT(InternViTConfig(**{**FIELDS, "hidden_size": 16})).save_pretrained(tmp_path)
    built = registry.build(dict(type="InternViTBackbone", config=FIELDS, out_indices=[3], pretrained=str(tmp_path)))
    with pytest.raises(ValueError, match="the weights do not fit the configuration: wrong shapes"):
        built.init_weights()


def test_bad_values(registry) -> None:
    cfg = dict(type="InternViTBackbone", config=FIELDS, out_indices=[3])
    with pytest.raises(ValueError, match="dtype: expected a name such as 'bfloat16', got 'half-ish'"):
        registry.build({**cfg, "dtype": "half-ish"})
    with pytest.raises(ValueError, match="init_cfg: expected type 'Pretrained', got 'Kaiming'"):
        registry.build({**cfg, "init_cfg": {"type": "Kaiming"}})


def test_without_mmseg_the_error_says_so(monkeypatch) -> None:
    for name in ("mmseg.registry", "mmdet.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "internvit.integrations.mmseg", raising=False)
    with pytest.raises(ImportError, match="neither mmseg nor mmdet is installed"):
        importlib.import_module("internvit.integrations.mmseg")
