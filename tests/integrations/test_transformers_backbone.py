"""InternViT as a transformers backbone, alone and inside UperNetForSemanticSegmentation."""

import pytest
import torch

import internvit
from internvit import InternViT, InternViTBackbone, InternViTConfig
from internvit.numerics import relative_error
from tests.support.models import random_weights

transformers = pytest.importorskip("transformers", reason="the hf extra is not installed")
hf = pytest.importorskip("internvit.integrations.transformers.model")
from internvit.integrations.transformers.backbone import HFInternViTBackbone  # noqa: E402 (needs transformers)

CONFIG = InternViTConfig(
    image_size=56, hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64
)


def settings(**more) -> "hf.InternVisionConfig":
    return hf.InternVisionConfig(**{k: v for k, v in CONFIG.to_dict().items() if k != "model_type"}, **more)


def made(**more) -> HFInternViTBackbone:
    backbone = HFInternViTBackbone(settings(**more)).eval()
    random_weights(backbone)
    return backbone


def upernet(backbone_config) -> torch.nn.Module:
    config = transformers.UperNetConfig(
        backbone_config=backbone_config,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_channels=8,
        auxiliary_in_channels=32,
        num_labels=3,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    random_weights(model.backbone)
    return model


@pytest.mark.parametrize("fpn", [False, True])
@torch.no_grad()
def test_maps_are_the_backbones(fpn) -> None:
    backbone = made(out_indices=[1, 2, 3, 4], fpn=fpn)
    ours = InternViTBackbone(CONFIG, out_indices=(0, 1, 2, 3), fpn=fpn).eval()
    ours.load_state_dict({k: v for k, v in backbone.state_dict().items() if "layers.4" not in k})
    pixels = torch.randn(2, 3, 56, 84)
    out = backbone(pixels)
    assert type(out) is transformers.modeling_outputs.BackboneOutput
    assert out.hidden_states is None
    for a, b in zip(out.feature_maps, ours(pixels), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(backbone(pixels, return_dict=False)[0][0], out.feature_maps[0])


@torch.no_grad()
def test_names_indices_and_states() -> None:
    backbone = made(out_features=["stem", "stage2"])
    assert backbone.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4", "stage5"]
    assert list(backbone.out_indices) == [0, 2]
    assert backbone.channels == [32, 32]
    assert made().out_features == ["stage5"]
    assert made(out_indices=(-2, -1)).out_features == ["stage4", "stage5"]
    pixels = torch.randn(1, 3, 56, 56)
    ran: list[int] = []
    for i, layer in enumerate(backbone.encoder.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    out = backbone(pixels, output_hidden_states=True, output_attentions=True)
    assert ran == [0, 1], "blocks past the last one do not run"
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    for x, state in zip(out.feature_maps, (out.hidden_states[0], out.hidden_states[2]), strict=True):
        assert torch.equal(x, state[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    backbone.out_features = ["stage5"]
    assert list(backbone.out_indices) == [5]
    whole = InternViT(CONFIG).eval()
    whole.load_state_dict(backbone.state_dict())
    assert torch.equal(
        backbone(pixels).feature_maps[0].flatten(2).transpose(1, 2), whole(pixels).last_hidden_state[:, 1:]
    )


def test_layers_have_no_hooks_and_stay_fused() -> None:
    from internvit.model.block import is_plain_layer

    assert all(map(is_plain_layer, made(out_indices=[1, 2, 3, 4]).encoder.layers))


@torch.no_grad()
def test_loads_an_opengvlab_folder(tmp_path) -> None:
    model = InternViT(CONFIG).eval()
    random_weights(model)
    model.save_pretrained(tmp_path)
    backbone = HFInternViTBackbone.from_pretrained(tmp_path, out_indices=[2, 5]).eval()
    assert type(transformers.AutoBackbone.from_config(backbone.config)) is HFInternViTBackbone
    pixels = torch.randn(1, 3, 70, 56)
    hidden = model(pixels, output_hidden_states=True).hidden_states
    for x, i in zip(backbone(pixels).feature_maps, (2, 5), strict=True):
        assert torch.equal(x, hidden[i][:, 1:].transpose(1, 2).unflatten(2, (5, 4)))
    with_fpn = HFInternViTBackbone.from_pretrained(tmp_path, out_indices=[2, 3, 4, 5], fpn=True)
    std = with_fpn.up2[0].weight.std().item()
    assert std == pytest.approx((2 / (4 * 32)) ** 0.5, rel=0.1), "a missing pyramid starts as upstream's does"


@pytest.mark.parametrize("fpn", [False, True])
def test_upernet_trains_and_is_saved(fpn, tmp_path) -> None:
    torch.use_deterministic_algorithms(False)  # adaptive pooling's backward has no deterministic form
    model = upernet(settings(out_indices=[2, 3, 4, 5], fpn=fpn)).train()
    pixels, labels = torch.randn(2, 3, 56, 84), torch.randint(0, 3, (2, 56, 84))
    out = model(pixel_values=pixels, labels=labels)
    assert out.logits.shape == (2, 3, 56, 84)
    out.loss.backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None}
    assert not unused
    assert model.backbone.encoder.layers[0].attn.qkv.weight.grad.abs().sum() > 0
    model.eval()
    model.save_pretrained(tmp_path)
    again = transformers.UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert type(again.backbone) is HFInternViTBackbone
    assert again.config.backbone_config.fpn is fpn
    assert list(again.backbone.out_indices) == [2, 3, 4, 5]
    weights = again.state_dict()
    assert all(torch.equal(weights.pop(name), tensor) for name, tensor in model.state_dict().items())
    assert not weights
    with torch.no_grad():  # a GEMM's rounding may follow where its operands lie in memory
        assert relative_error(again(pixels).logits, model(pixels).logits) <= 1e-5


def test_upernet_is_the_same_on_the_reference_backend() -> None:
    model = upernet(settings(out_indices=[2, 3, 4, 5], fpn=True)).eval()
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected = model(pixels).logits
        with internvit.backend("reference"):
            assert relative_error(model(pixels).logits, expected) < 1e-5


def test_frozen_keeps_no_graph() -> None:
    backbone = made(out_indices=[5]).requires_grad_(False)
    assert not backbone(torch.randn(1, 3, 56, 56)).feature_maps[0].requires_grad


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"out_indices": [1, 2], "fpn": True}, "fpn: the pyramid takes four maps, out_features has 2"),
        ({"out_indices": [1], "final_norm": True}, "final_norm"),
        ({"out_features": ["stage9"]}, "out_features must be a subset of stage_names"),
    ],
)
def test_bad_settings(more, message) -> None:
    with pytest.raises(ValueError, match=message):
        HFInternViTBackbone(settings(**more))
