"""The configuration: published variants, every upstream's spelling, refusals, round trips."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvit.config import HUB_IDS, VARIANTS, InternViTConfig
from tests.support.strategies import configs

SIX_BILLION = {
    "num_channels": 3,
    "patch_size": 14,
    "hidden_size": 3200,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "drop_path_rate": 0.0,
    "initializer_factor": 0.1,
    "pos_embed_mode": "float32",
    "head_dim": 128,
}
SMALL = {
    "num_channels": 3,
    "patch_size": 14,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "norm_type": "layer_norm",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "qk_normalization": False,
    "drop_path_rate": 0.1,
    "initializer_factor": 1.0,
    "pos_embed_mode": "float32",
    "head_dim": 64,
}
PUBLISHED = {  # name: (hub id, common fields, layers, image_size, tokens, parameters)
    "internvit-6b-224px": ("OpenGVLab/InternViT-6B-224px", SIX_BILLION, 48, 224, 257, 5_902_793_600),
    "internvit-6b-448px-v1.0": ("OpenGVLab/InternViT-6B-448px-V1-0", SIX_BILLION, 48, 448, 1025, 5_905_251_200),
    "internvit-6b-448px-v1.2": ("OpenGVLab/InternViT-6B-448px-V1-2", SIX_BILLION, 45, 448, 1025, 5_536_496_000),
    "internvit-6b-448px-v1.5": ("OpenGVLab/InternViT-6B-448px-V1-5", SIX_BILLION, 45, 448, 1025, 5_536_496_000),
    "internvit-6b-448px-v2.5": ("OpenGVLab/InternViT-6B-448px-V2_5", SIX_BILLION, 45, 448, 1025, 5_536_496_000),
    "internvit-300m-448px": ("OpenGVLab/InternViT-300M-448px", SMALL, 24, 448, 1025, 304_012_288),
    "internvit-300m-448px-v2.5": ("OpenGVLab/InternViT-300M-448px-V2_5", SMALL, 24, 448, 1025, 304_012_288),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variants(name: str) -> None:
    hub_id, fields, layers, image_size, tokens, parameters = PUBLISHED[name]
    config = InternViTConfig.from_name(name)
    assert {field: getattr(config, field) for field in fields} == fields
    assert (config.num_hidden_layers, config.image_size, config.num_tokens) == (layers, image_size, tokens)
    assert config.num_parameters() == parameters
    assert config.name == name
    assert HUB_IDS[name] == hub_id
    assert InternViTConfig.from_name(hub_id) == config


def test_registry_is_complete() -> None:
    assert VARIANTS.keys() == HUB_IDS.keys() == PUBLISHED.keys()
    with pytest.raises(ValueError, match=r"name must be one of internvit-6b-224px, .*got 'internvit-7b'"):
        InternViTConfig.from_name("internvit-7b")
    changed = InternViTConfig.from_name("internvit-300m-448px", drop_path_rate=0.0)
    assert (changed.drop_path_rate, changed.name) == (0.0, None)


def test_one_block_of_6b_has_122918400_parameters() -> None:
    six = InternViTConfig.from_name("internvit-6b-224px")
    assert six.num_parameters() - six.replace(num_hidden_layers=47).num_parameters() == 122_918_400


def test_parameters_are_those_of_the_model() -> None:
    from internvit.reference import InternViT

    for name in ("internvit-6b-448px-v2.5", "internvit-300m-448px"):
        config = InternViTConfig.from_name(name, num_hidden_layers=2, hidden_size=400, intermediate_size=40)
        shapes = {key: tuple(value.shape) for key, value in InternViT(config).state_dict().items()}
        assert config.parameter_shapes() == shapes


OPENGVLAB_6B = {  # config.json of InternViT-6B-448px-V1-2, before norm_type existed
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_intern_vit.InternVisionConfig"},
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 3200,
    "image_size": 448,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 12800,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "num_attention_heads": 25,
    "num_channels": 3,
    "num_hidden_layers": 45,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
    "use_flash_attn": True,
}
INTERNVL3_VISION = {  # vision_config of InternVL3, with its stray keys
    "_attn_implementation_autoset": True,
    "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5",
    "capacity_factor": 1.2,
    "drop_path_rate": 0.1,
    "hidden_act": "gelu",
    "hidden_size": 1024,
    "image_size": 448,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 4096,
    "laux_allreduce": "all_nodes",
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "norm_type": "layer_norm",
    "num_attention_heads": 16,
    "num_experts": 8,
    "num_hidden_layers": 24,
    "num_routed_experts": 4,
    "patch_size": 14,
    "qk_normalization": False,
    "qkv_bias": True,
    "use_flash_attn": False,
    "use_moe": False,
}


def test_opengvlab_without_norm_type() -> None:
    expected = InternViTConfig.from_name("internvit-6b-448px-v1.2").replace(name=None)
    assert InternViTConfig.from_dict(OPENGVLAB_6B) == expected.replace()


def test_whole_internvl_with_stray_keys(tmp_path) -> None:
    whole = {"model_type": "internvl_chat", "hidden_size": 896, "llm_config": {"hidden_size": 896}}
    expected = InternViTConfig.from_name("internvit-300m-448px", initializer_factor=0.1, initializer_range=1e-10)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**whole, "vision_config": INTERNVL3_VISION, "name": 3}))
    assert InternViTConfig.from_json(path) == expected
    assert InternViTConfig.from_dict({**INTERNVL3_VISION, "name": ["a stray key"]}) == expected


def test_transformers_spelling() -> None:
    transformers = pytest.importorskip("transformers")
    small = InternViTConfig.from_name(
        "internvit-300m-448px", qkv_bias=False, drop_path_rate=0.0, initializer_factor=0.1, qk_norm_eps=1e-6,
        pos_embed_mode="param_dtype",
    )  # fmt: skip
    theirs = transformers.InternVLVisionConfig()
    assert InternViTConfig.from_dict(theirs.to_dict()) == small
    assert InternViTConfig.from_dict(theirs.to_diff_dict()) == small
    assert InternViTConfig.from_dict({"model_type": "internvl_vision"}) == small
    theirs = transformers.InternVLVisionConfig(
        hidden_size=96, num_attention_heads=3, image_size=(28, 56), layer_norm_eps=1e-5, use_qk_norm=True,
        attention_bias=True, norm_type="rms_norm", layer_scale_init_value=0.3, patch_size=[14, 14],
    )  # fmt: skip
    assert InternViTConfig.from_dict(theirs.to_dict()) == small.replace(
        hidden_size=96, num_attention_heads=3, image_size=(28, 56), layer_norm_eps=1e-5, qk_normalization=True,
        qkv_bias=True, norm_type="rms_norm", initializer_factor=0.3,
    )  # fmt: skip


def test_our_transformers_spelling_is_theirs() -> None:
    transformers = pytest.importorskip("transformers")
    ours = InternViTConfig.from_name("internvit-6b-448px-v2.5", image_size=(448, 224), drop_path_rate=0.2)
    theirs = transformers.InternVLVisionConfig.from_dict(ours.to_dict("transformers"))
    assert (theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads) == (3200, 45, 25)
    assert (theirs.use_qk_norm, theirs.attention_bias, theirs.norm_type) == (True, False, "rms_norm")
    assert (theirs.layer_scale_init_value, theirs.layer_norm_eps, theirs.intermediate_size) == (0.1, 1e-6, 12800)
    assert (tuple(theirs.image_size), tuple(theirs.patch_size)) == ((448, 224), (14, 14))
    assert InternViTConfig.from_dict(theirs.to_dict()) == ours


def test_mmseg_spelling() -> None:
    backbone = {
        "type": "InternViT6B", "pretrain_size": 224, "img_size": 504, "patch_size": 14, "embed_dim": 3200, "depth": 48,
        "num_heads": 25, "mlp_ratio": 4.0, "qkv_bias": False, "drop_path_rate": 0.4, "init_values": 0.1,
        "with_cp": True, "use_flash_attn": True, "qk_normalization": True, "layerscale_force_fp32": False,
        "out_indices": [11, 23, 35, 47], "freeze_vit": True, "with_fpn": True, "pretrained": "x.pth",
    }  # fmt: skip
    expected = InternViTConfig(image_size=504, drop_path_rate=0.4, pos_embed_mode="static")
    assert InternViTConfig.from_dict(backbone) == expected
    # The width alone: the MLP follows it, the rest is the class's default.
    narrow = InternViTConfig.from_dict({"type": "InternViT6B", "embed_dim": 400})
    assert (narrow.hidden_size, narrow.intermediate_size, narrow.num_hidden_layers) == (400, 1600, 48)


def test_timm_spelling() -> None:
    small = InternViTConfig.from_name("internvit-300m-448px", drop_path_rate=0.0, initializer_factor=0.1)
    small = small.replace(pos_embed_mode="antialias")
    arguments = {
        "patch_size": 14, "embed_dim": 1024, "depth": 24, "num_heads": 16, "init_values": 0.1, "final_norm": False,
        "dynamic_img_size": True,
    }  # fmt: skip
    assert InternViTConfig.from_dict({**arguments, "img_size": 448}) == small
    assert InternViTConfig.from_dict({**arguments, "img_size": (448, 448), "mlp_ratio": 2}) == small.replace(
        intermediate_size=2048
    )
    hub = {"architecture": "vit_intern300m_patch14_448", "num_classes": 0, "pretrained_cfg": {"tag": "ogvl_dist"}}
    assert InternViTConfig.from_dict(hub) == small
    assert InternViTConfig.from_dict({**hub, "model_args": {"img_size": 224}}) == small.replace(image_size=224)
    with pytest.raises(ValueError, match="architecture must be one of vit_intern300m_patch14_448, got 'resnet50'"):
        InternViTConfig.from_dict({"architecture": "resnet50"})


@pytest.mark.parametrize("size", [448, [448, 448], (448, 448)])
def test_square_sizes_are_one_int(size) -> None:
    config = InternViTConfig(image_size=size)
    assert config.image_size == 448
    assert config.image_hw == (448, 448)
    assert InternViTConfig.from_dict({"image_size": size, "patch_size": [14, 14]}) == config


def test_properties() -> None:
    config = InternViTConfig(image_size=(28, 70), drop_path_rate=0.3, num_hidden_layers=4, layer_norm_eps=1e-5)
    assert config.grid_size == (2, 5)
    assert config.num_tokens == 11
    assert config.drop_path_rates() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert config.replace(num_hidden_layers=1).drop_path_rates() == [0.0]
    assert config.replace(num_hidden_layers=0).drop_path_rates() == []
    assert config.effective_qk_norm_eps == 1e-5
    assert config.replace(qk_norm_eps=1e-6).effective_qk_norm_eps == 1e-6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 3201}, "hidden_size must be a multiple of num_attention_heads=25, got 3201"),
        ({"hidden_size": True}, "hidden_size must be a positive int, got True"),
        ({"patch_size": 0}, "patch_size must be a positive int, got 0"),
        ({"patch_size": [14, 16]}, r"patch_size must be square, got \[14, 16\]"),
        ({"patch_size": []}, r"patch_size must be square, got \[\]"),
        ({"num_channels": "3"}, "num_channels must be a positive int, got '3'"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be an int >= 0, got -1"),
        ({"image_size": 225}, "image_size must be one or two positive multiples of patch_size=14, got 225"),
        ({"image_size": [14, 14, 14]}, "image_size must be one or two"),
        ({"image_size": []}, "image_size must be one or two"),
        ({"norm_type": "batch_norm"}, "norm_type must be one of rms_norm, layer_norm, got 'batch_norm'"),
        ({"pos_embed_mode": "nearest"}, "pos_embed_mode must be one of"),
        ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be a finite number, got '1e-6'"),
        ({"layer_norm_eps": -1e-6}, "layer_norm_eps must be a number >= 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a finite number"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\)"),
        ({"qk_norm_eps": -1.0}, "qk_norm_eps must be a number >= 0 or None"),
        ({"qk_norm_eps": "x"}, "qk_norm_eps must be a number >= 0 or None"),
        ({"qkv_bias": "false"}, "qkv_bias must be True or False, got 'false'"),
        ({"initializer_factor": float("inf")}, "initializer_factor must be a finite number"),
        ({"dropout": 0.1}, "dropout must be 0 for an InternViT, got 0.1"),
        ({"attention_dropout": 0.1}, "attention_dropout must be 0"),
        ({"hidden_act": "quick_gelu"}, r"hidden_act must be 'gelu' \(exact erf\) for an InternViT, got 'quick_gelu'"),
        ({"model_type": "internvl_vision", "use_mean_pooling": False}, "use_mean_pooling must be True"),
        ({"embed_dim": 64, "qk_norm": True}, "qk_norm must be False"),
        ({"embed_dim": 64, "final_norm": True}, "final_norm must be False"),
        ({"model_type": "qwen2", "hidden_size": 896}, "model_type must be intern_vit_6b or .* got 'qwen2'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "model_type must be .* got 'siglip_vision_model'"),
    ],
)
def test_refusals(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InternViTConfig.from_dict(fields)


@pytest.mark.parametrize("fields", [[], [1], "x", None, 7])
def test_what_is_no_mapping(fields) -> None:
    with pytest.raises(ValueError, match="expected a mapping of fields, got"):
        InternViTConfig.from_dict(fields)


@pytest.mark.parametrize("size", [(14, 14, 14), (), "224", None, 14.0])
def test_constructor_refuses_odd_image_sizes(size) -> None:
    with pytest.raises(ValueError, match="image_size must be one or two"):
        InternViTConfig(image_size=size)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "JSON object, got list")])
def test_broken_json(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        InternViTConfig.from_json(path)
    assert str(path) in str(error.value)


def test_transformers_spelling_refuses_another_qk_norm_eps() -> None:
    config = InternViTConfig(layer_norm_eps=1e-5)
    with pytest.raises(ValueError, match="qk_norm_eps must be 1e-6 for transformers, got 1e-05"):
        config.to_dict("transformers")
    assert InternViTConfig.from_dict(config.to_dict("opengvlab")) == config
    with pytest.raises(ValueError, match=r"spelling must be one of opengvlab, .*, mmseg, got 'hf'"):
        config.to_dict("hf")


@given(configs(), st.dictionaries(st.sampled_from(["num_experts", "use_moe", "torch_dtype", "_x"]), st.integers()))
def test_round_trip(config: InternViTConfig, stray: dict) -> None:
    fields = json.loads(json.dumps(config.to_dict()))
    assert InternViTConfig.from_dict({**fields, **stray}) == config
    assert InternViTConfig.from_dict({"model_type": "internvl_chat", "vision_config": fields}) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config.replace()) == hash(config)
    for spelling in ("timm", "mmseg"):
        assert InternViTConfig.from_dict(json.loads(json.dumps(config.to_dict(spelling)))) == config
    if not config.qk_normalization or config.effective_qk_norm_eps == 1e-6:
        assert InternViTConfig.from_dict(json.loads(json.dumps(config.to_dict("transformers")))) == config
