"""Vision transformers with InternViT's block under other names: each against its own implementation."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit import InternViT, InternViTConfig
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.numerics import relative_error
from internvit.upstream import OPENGVLAB, known_layouts, register_layout
from internvit.upstream.layouts import LAYOUTS
from tests.support.models import random_weights
from tests.support.upstream import dinov2, interns1
from tests.upstream.test_patch import compare

WIDTH, HEADS, HIDDEN, LAYERS = 96, 4, 192, 3


class Blocks(nn.Module):
    """Blocks alone, on hidden states [B, N, C]."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward_features(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def transformers_model(name: str, rate: float, **changes) -> nn.Module:
    import transformers

    config = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": 56,
        "patch_size": 14,
        "drop_path_rate": rate,
        **changes,
    }
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))


def qianfan(norm_type: str, rate: float) -> nn.Module:
    changes = {"use_qk_norm": norm_type == "rms_norm", "norm_type": norm_type, "intermediate_size": HIDDEN}
    return transformers_model("QianfanOCRVision", rate, **changes)


FAMILIES = {
    "QianfanOCRVisionLayer, layer_norm": lambda rate: qianfan("layer_norm", rate),
    "QianfanOCRVisionLayer, rms_norm": lambda rate: qianfan("rms_norm", rate),
    "InternS1VisionLayer, layer_norm": lambda rate: Blocks(
        *(interns1.InternS1VisionLayer(WIDTH, HEADS, HIDDEN, "layer_norm", rate) for _ in range(LAYERS))
    ),
    "InternS1VisionLayer, rms_norm": lambda rate: Blocks(
        *(interns1.InternS1VisionLayer(WIDTH, HEADS, HIDDEN, "rms_norm", rate) for _ in range(LAYERS))
    ),
    "Dinov2Layer": lambda rate: transformers_model("Dinov2", rate, mlp_ratio=2),
    "Dinov2WithRegistersLayer": lambda rate: transformers_model("Dinov2WithRegisters", rate, mlp_ratio=2),
    "RadioLayer": lambda rate: transformers_model("Radio", rate, mlp_ratio=2.0, max_img_size=56, patch_dim=588),
    "NestedTensorBlock": lambda rate: Blocks(
        *(dinov2.NestedTensorBlock(WIDTH, HEADS, HIDDEN, rate) for _ in range(LAYERS))
    ),
}


def built(family: str, rate: float = 0.0) -> tuple[nn.Module, Tensor]:
    """A small model of a family, in eval mode, whose every part matters, and its input."""
    model = FAMILIES[family](rate).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * torch.randn_like(p))
            else:
                p.copy_((0.3 if "lambda" in name or "gamma" in name else 0.0) + 0.2 * torch.randn_like(p))
    return model, torch.randn(2, 17, WIDTH) if isinstance(model, Blocks) else torch.randn(2, 3, 56, 56)


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_outputs_and_gradients(family) -> None:
    print(f"{family}: bfloat16 {compare(*built(family)):.3f} of unpatched's error")


@pytest.mark.slow
def test_dinov2_b() -> None:
    """DINOv2-B of transformers, 12 layers at 518 px."""
    import transformers

    model = transformers.Dinov2Model(transformers.Dinov2Config(drop_path_rate=0.0)).eval()
    random_weights(model)
    print(f"bfloat16 {compare(model, torch.randn(1, 3, 518, 518)):.3f} of unpatched's error")


def output(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_features(x) if isinstance(model, Blocks) else model(x).last_hidden_state


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "NestedTensorBlock"])
def test_drop_path_draws_the_numbers_of_the_family(family) -> None:
    model, x = built(family, 0.5)
    model.train()
    torch.manual_seed(1)
    before = output(model, x)
    with internvit.patch(model):
        torch.manual_seed(1)
        after = output(model, x)
    assert relative_error(after, before) <= 1e-5
    assert relative_error(after, output(model.eval(), x)) > 0.01


def test_facebookresearch_drops_images_by_itself_in_training() -> None:
    model, x = built("NestedTensorBlock", 0.5)
    handle = internvit.patch(model)
    assert len(handle.fused) == LAYERS
    assert all("sample_drop_ratio is 0.5 in training" in reason for reason in _left(model.train(), handle))
    torch.manual_seed(1)
    after = output(model, x)
    handle.undo()
    torch.manual_seed(1)
    assert torch.equal(output(model, x), after)


def _left(model: nn.Module, handle: internvit.PatchHandle) -> list[str]:
    assert len(handle.left) == LAYERS
    return list(handle.left.values())


def test_a_list_of_images_is_for_the_blocks_own_forward() -> None:
    model, x = built("NestedTensorBlock")
    expected = [model.blocks[0](t) for t in (x, x[:, :5])]
    internvit.patch(model)
    assert all(map(torch.equal, model.blocks[0]([x, x[:, :5]]), expected))


def test_a_gated_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match="mlp a Dinov2SwiGLUFFN, expected Dinov2Attention and Dinov2MLP"):
        internvit.patch(transformers_model("Dinov2", 0.0, use_swiglu_ffn=True))
    gated = Blocks(dinov2.NestedTensorBlock(WIDTH, HEADS, HIDDEN, ffn=dinov2.SwiGLUFFNFused))
    with pytest.raises(ValueError, match="mlp a SwiGLUFFNFused, expected MemEffAttention and Mlp"):
        internvit.patch(gated)


def test_every_class_of_the_table_is_tried() -> None:
    known = {names[0] for layout in LAYOUTS for names in layout.classes}
    elsewhere = {"InternVisionEncoderLayer", "InternVLVisionLayer", "Block"}  # test_patch.py
    assert known == {family.split(",")[0] for family in FAMILIES} | elsewhere


class OwnAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class OwnBlock(nn.Module):
    """A pre-norm block without LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = OwnAttention(), dinov2.Mlp(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@pytest.fixture
def own_layouts(monkeypatch):
    """What a test registers ends with it."""
    monkeypatch.setattr("internvit.upstream.layouts._layouts", list(reversed(known_layouts())))


def test_a_family_can_be_registered(own_layouts) -> None:
    model, x = Blocks(OwnBlock(), OwnBlock()), torch.randn(2, 17, WIDTH)
    with pytest.raises(ValueError, match="got none in Blocks"):
        internvit.patch(model)
    layout = dataclasses.replace(
        OPENGVLAB,
        name="own",
        classes=(("OwnBlock", "OwnAttention", "Mlp"),),
        proj="attn.out",
        gammas=(),
        drop_paths=(),
        dropouts=("mlp.drop",),
        num_heads="heads",
    )
    register_layout(layout)
    register_layout(layout)
    assert known_layouts()[0] == layout
    assert len(known_layouts()) == len(set(known_layouts()))
    before = output(model, x)
    handle = internvit.patch(model, verify=True)
    assert "fused (own): blocks.0 to blocks.1" in str(handle)
    assert relative_error(output(model, x), before) <= 1e-5
    handle.undo()
    compare(model, x)


def test_what_cannot_be_registered(own_layouts) -> None:
    with pytest.raises(TypeError, match=r"layout: expected an internvit\.upstream\.Layout, got dict"):
        register_layout({})
    with pytest.raises(ValueError, match="there is another one of the name 'opengvlab'"):
        register_layout(dataclasses.replace(OPENGVLAB, proj="attn.out"))
    with pytest.raises(ValueError, match="qkv must be 1 or 3 names"):
        dataclasses.replace(OPENGVLAB, qkv=("attn.q", "attn.kv"))
    with pytest.raises(ValueError, match=r"classes must be names of \(block, attention, MLP\)"):
        dataclasses.replace(OPENGVLAB, classes=("Block",))
    register_layout(dataclasses.replace(OPENGVLAB, name="wrong", classes=(("OwnBlock", "OwnAttention", "Mlp"),)))
    with pytest.raises(ValueError, match=r"blocks\.0: it has a part that is not known here, attn\.out"):
        internvit.patch(Blocks(OwnBlock()))
    register_layout(
        dataclasses.replace(
            OPENGVLAB,
            name="wrong 2",
            classes=(("OwnBlock", "OwnAttention", "Mlp"),),
            proj="attn.out",
            idle=("mlp.drop",),
        )
    )
    with pytest.raises(ValueError, match=r"it has no ls1"):
        internvit.patch(Blocks(OwnBlock()))


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_a_qianfan_checkpoint_and_its_configuration_load(norm_type) -> None:
    tower, pixels = built(f"QianfanOCRVisionLayer, {norm_type}")
    fields = tower.config.to_dict()
    config = InternViTConfig.from_dict({"model_type": "qianfan_ocr", "vision_config": fields})
    assert config.norm_type == norm_type
    assert config.qk_normalization == (norm_type == "rms_norm")
    model = InternViT(config).eval()
    state_dict = {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    model.load_state_dict(convert_state_dict(state_dict, to="opengvlab"))
    assert relative_error(model(pixels).last_hidden_state, tower(pixels).last_hidden_state) <= 1e-5


def test_defaults_of_each_familys_configuration() -> None:
    assert InternViTConfig.from_dict({"model_type": "qianfan_ocr_vision"}).qkv_bias
    assert not InternViTConfig.from_dict({"model_type": "interns1_vision"}).qkv_bias
    with pytest.raises(ValueError, match="use_mean_pooling must be True"):
        InternViTConfig.from_dict({"model_type": "qianfan_ocr_vision", "use_mean_pooling": False})
    with pytest.raises(ValueError, match=r"model_type must be .*interns1_vision.*got 'dinov2'"):
        InternViTConfig.from_dict({"model_type": "dinov2"})
