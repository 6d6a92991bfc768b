"""Key layouts: any to any and back is the identity, bit for bit; every prefix and wrapper; nothing is lost silently."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internvit.checkpoint.state_dict import LAYOUTS, conversion_plan, convert_state_dict, detect_layout, infer_config
from internvit.config import InternViTConfig
from tests.support.strategies import configs, random_weights

QK_NORM = InternViTConfig(
    image_size=28, hidden_size=256, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
)
PLAIN = QK_NORM.replace(
    norm_type="layer_norm", qkv_bias=True, qk_normalization=False, num_attention_heads=4, image_size=42
)
CONFIGS = pytest.mark.parametrize("config", [QK_NORM, PLAIN], ids=["qk_norm", "plain"])


def layouts_of(config: InternViTConfig) -> list[str]:
    return [layout for layout in LAYOUTS if layout != "timm" or not config.qk_normalization]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype
        assert actual[key].shape == tensor.shape
        bits = [t.contiguous().view(torch.uint8) for t in (actual[key], tensor)]
        assert torch.equal(*bits), key


@settings(max_examples=150)
@given(
    configs().filter(lambda config: config.num_hidden_layers > 0),
    st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.integers(0, 2**31),
)
def test_any_layout_to_any_and_back(
    config: InternViTConfig, data: st.DataObject, dtype: torch.dtype, seed: int
) -> None:
    layouts = st.sampled_from(layouts_of(config))
    weights = random_weights(config, dtype, seed)
    weights["embeddings.class_embedding"].view(-1)[0] = float("nan")  # bits, not values
    first = data.draw(layouts)
    start = convert_state_dict(weights, first, config=config)
    keys = data.draw(st.permutations(sorted(start)))
    prefix = data.draw(st.sampled_from(["", "vision_model.", "backbone.", "model.vision_tower."]))
    current = {prefix + key: start[key].clone() for key in keys}
    for layout in [*data.draw(st.lists(layouts, max_size=3)), first]:
        current = convert_state_dict(current, layout, config=config)
        assert sum(tensor.numel() for tensor in current.values()) == config.num_parameters()
    assert_same(current, start)
    assert_same(convert_state_dict(current), weights)


@CONFIGS
def test_detect_layout(config: InternViTConfig) -> None:
    weights = random_weights(config)
    for layout in layouts_of(config):
        converted = convert_state_dict(weights, layout)
        expected = "timm" if layout == "mmseg" and not config.qk_normalization else layout  # they share their keys
        assert detect_layout(converted) == (expected, "")
        assert detect_layout([f"a.b.{key}" for key in converted]) == (expected, "a.b.")
        if layout == "mmseg":
            assert detect_layout([f"backbone.{key}" for key in converted]) == ("mmseg", "backbone.")
            assert detect_layout([*converted, "up1.0.weight"]) == ("mmseg", "")


def test_transformers_split_is_in_order() -> None:
    weights = random_weights(PLAIN)
    theirs = convert_state_dict(weights, "transformers")
    width = PLAIN.hidden_size
    for leaf in ("weight", "bias"):
        packed = weights[f"encoder.layers.1.attn.qkv.{leaf}"]
        for part, name in enumerate("qkv"):
            split = theirs[f"encoder.layer.1.attention.{name}_proj.{leaf}"]
            assert torch.equal(split, packed[part * width : (part + 1) * width])
            assert split.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()  # a view, no copy


@CONFIGS
def test_transformers_model_has_these_keys(config: InternViTConfig) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.InternVLVisionConfig.from_dict(config.to_dict("transformers"))
    model = transformers.InternVLVisionModel(theirs)
    weights = random_weights(config)
    model.load_state_dict(convert_state_dict(weights, "transformers"), strict=True)
    assert_same(convert_state_dict(model.state_dict(), config=config), weights)


def test_timm_model_has_these_keys() -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    model = vision_transformer.VisionTransformer(
        img_size=42, patch_size=14, embed_dim=256, depth=2, num_heads=4, mlp_ratio=48 / 256, init_values=0.1,
        final_norm=False, num_classes=0,
    )  # fmt: skip
    weights = random_weights(PLAIN)
    model.load_state_dict(convert_state_dict(weights, "timm"), strict=True)
    assert_same(convert_state_dict(model.state_dict(), config=PLAIN), weights)


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [
        ("opengvlab", "vision_model."),  # InternVL chat
        ("opengvlab", "model.vision_tower.vision_tower."),  # LLaVA
        ("opengvlab", "base_model.model.vision_model."),  # PEFT
        ("opengvlab", "module."),  # DistributedDataParallel
        ("opengvlab", "_orig_mod."),  # torch.compile
        ("transformers", "vision_tower."),  # up to 4.51
        ("transformers", "model.vision_tower."),
        ("mmseg", "backbone."),
    ],
)
@CONFIGS
def test_prefixes(layout: str, prefix: str, config: InternViTConfig) -> None:
    weights = random_weights(config)
    prefixed = {prefix + key: value for key, value in convert_state_dict(weights, layout).items()}
    neighbours = {"language_model.model.layers.0.mlp.gate_proj.weight": torch.zeros(2), "mlp1.0.weight": torch.zeros(2)}
    assert detect_layout([*prefixed, *neighbours]) == (layout, prefix)
    assert_same(convert_state_dict({**neighbours, **prefixed}, config=config), weights)


@pytest.mark.parametrize("wrapper", ["module", "model", "state_dict"])
def test_wrappers(wrapper: str) -> None:
    weights = random_weights(QK_NORM)
    mmseg = convert_state_dict(weights, "mmseg")
    assert_same(convert_state_dict({wrapper: mmseg, "epoch": 3, "optimizer": {"lr": 1.0}}), weights)
    segmentation = {f"backbone.{key}": value for key, value in mmseg.items()}
    segmentation |= {"decode_head.conv_seg.weight": torch.zeros(1), "auxiliary_head.conv_seg.weight": torch.zeros(1)}
    assert_same(convert_state_dict({"meta": {"epoch": 1}, wrapper: segmentation}), weights)


def test_peft_base_layers() -> None:
    weights = random_weights(QK_NORM)
    peft = {}
    for key, value in weights.items():
        linear = any(name in key for name in ("qkv", "proj", "fc1", "fc2"))
        name = f"base_model.model.vision_model.{key}"
        peft[name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias") if linear else name] = (
            value
        )
    language = {"base_model.model.language_model.layers.0.wqkv.lora_A.default.weight": torch.zeros(1)}
    assert_same(convert_state_dict({**peft, **language}, config=QK_NORM), weights)
    adapter = "base_model.model.vision_model.encoder.layers.0.attn.qkv.lora_A.default.weight"
    with pytest.raises(ValueError, match=r"lora_A.default.weight; merge it first \(PEFT: model.merge_and_unload\(\)\)"):
        convert_state_dict({**peft, adapter: torch.zeros(1)})
    with pytest.raises(ValueError, match="merge it first"):
        convert_state_dict({adapter: torch.zeros(1)})


def test_sglang_and_vitp_spellings() -> None:
    weights = random_weights(QK_NORM)
    sglang = {
        f"vision_model.{k.replace('.attn.', '.attn.attn.').replace('.qkv.', '.qkv_proj.')}": v
        for k, v in weights.items()
    }
    assert any(".attn.attn.qkv_proj." in key for key in sglang)
    assert_same(convert_state_dict(sglang, config=QK_NORM), weights)
    vitp = {key.removeprefix("encoder."): value for key, value in weights.items()}
    assert "layers.0.ls1" in vitp
    assert_same(convert_state_dict(vitp, config=QK_NORM), weights)
    assert detect_layout([f"backbone.{key}" for key in vitp]) == ("opengvlab", "backbone.")


def test_misplaced_qk_norm_is_restored() -> None:
    weights = random_weights(QK_NORM)
    theirs = convert_state_dict(weights, "transformers")
    custom = {
        "model.vision_tower." + (key.replace(".attention.", ".attn.") if "_norm." in key else key): value
        for key, value in theirs.items()
    }
    assert "model.vision_tower.encoder.layer.1.attn.q_norm.weight" in custom
    assert_same(convert_state_dict(custom, config=QK_NORM), weights)
    assert_same(convert_state_dict(custom, "transformers", config=QK_NORM), theirs)
    twice = {**custom, "model.vision_tower.encoder.layer.1.attention.q_norm.weight": torch.zeros(256)}
    with pytest.raises(ValueError, match="expected one key a parameter"):
        convert_state_dict(twice)


@pytest.mark.parametrize(
    ("layout", "extras"),
    [
        (
            "mmseg",
            ["clip_projector.norm1_q.weight", "clip_projector.cross_attn.q_bias", "clip_projector.cross_attn.q.weight"],
        ),
        ("mmseg", ["head.weight", "head.bias", "norm.weight", "norm.running_mean", "norm.num_batches_tracked"]),
        ("mmseg", ["up1.0.weight", "up1.1.bias", "up2.0.weight", "up4.1.weight", "mask_token"]),
        ("transformers", ["embeddings.mask_token"]),
    ],
)
def test_extras_are_set_aside_and_logged(layout: str, extras: list[str], caplog) -> None:
    weights = random_weights(QK_NORM)
    stored = convert_state_dict(weights, layout)
    with caplog.at_level(logging.INFO, "internvit"):
        converted = convert_state_dict({**stored, **{name: torch.zeros(3) for name in extras}}, config=QK_NORM)
    assert_same(converted, weights)
    assert all(name in caplog.text for name in extras)
    assert set(conversion_plan([*stored, *extras]).set_aside) == set(extras)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("timm", "norm.weight"),  # a final norm changes the features
        ("transformers", "layernorm.weight"),
        ("opengvlab", "encoder.layers.0.attn.relative_position_bias"),
        ("opengvlab", "blocks.0.norm1.weight"),  # another layout's name
    ],
)
def test_unknown_keys_are_an_error(layout: str, name: str) -> None:
    stored = convert_state_dict(random_weights(PLAIN), layout)
    with pytest.raises(ValueError, match=f"unexpected keys: {name}"):
        convert_state_dict({**stored, name: torch.zeros(256)})


def test_6b_has_no_form_in_timm() -> None:
    with pytest.raises(ValueError, match="QK-norm over the whole width, got 'timm', whose qk_norm is per head"):
        convert_state_dict(random_weights(QK_NORM), "timm")
    per_head = convert_state_dict(random_weights(PLAIN), "timm")
    per_head |= {f"blocks.{i}.attn.{name}.weight": torch.ones(64) for i in range(2) for name in ("q_norm", "k_norm")}
    for convert in (convert_state_dict, infer_config):
        with pytest.raises(ValueError, match=r"over the whole width \(256,\), got \(64,\): QK-norm per head"):
            convert(per_head)


def test_a_config_makes_it_complete() -> None:
    weights = random_weights(QK_NORM)
    short = {key: value for key, value in weights.items() if "layers.1." not in key}
    assert_same(convert_state_dict(short), short)  # a shard may be converted alone
    with pytest.raises(ValueError, match=r"missing keys: encoder.layers.1.norm1.weight.*\.\.\. \(13 in all\)"):
        convert_state_dict(short, "transformers", config=QK_NORM)
    weights["encoder.layers.0.ls1"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"wrong shapes: encoder.layers.0.ls1 \(expected \(256,\), got \(3,\)\)"):
        convert_state_dict(weights, config=QK_NORM)


def test_incomplete_qkv_is_an_error() -> None:
    theirs = convert_state_dict(random_weights(PLAIN), "transformers")
    del theirs["encoder.layer.1.attention.v_proj.bias"]
    with pytest.raises(ValueError, match=r"expected q, k and v, got only encoder.layer.1.attention.q_proj.bias"):
        convert_state_dict(theirs)
    packed = {"encoder.layers.0.attn.qkv.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"expected q, k and v of one size in encoder.layers.0.attn.qkv.bias"):
        convert_state_dict(packed, "transformers")
    theirs = convert_state_dict(random_weights(PLAIN), "transformers")
    theirs["encoder.layer.1.attention.v_proj.bias"] = torch.zeros(256, dtype=torch.float16)
    with pytest.raises(ValueError, match="expected q, k and v of one dtype"):
        convert_state_dict(theirs)
    theirs["encoder.layer.1.attention.v_proj.bias"] = torch.zeros(1)
    with pytest.raises(ValueError, match="expected q, k and v of one shape"):
        convert_state_dict(theirs)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({}, "expected the keys of an InternViT .* got no keys"),
        ({"conv1.weight": torch.zeros(1)}, "expected the keys of an InternViT .* got conv1.weight"),
        ({"cls_token": "text"}, "expected a tensor under every name, got something else under cls_token"),
        (
            {"teacher.cls_token": torch.zeros(1), "student.cls_token": torch.zeros(1)},
            "expected one InternViT, got 2: teacher.cls_token, student.cls_token",
        ),
    ],
)
def test_what_is_no_internvit(state_dict: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_state_dict(state_dict)


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="to: expected one of opengvlab, transformers, timm, mmseg, got 'hf'"):
        convert_state_dict(random_weights(PLAIN), "hf")


@CONFIGS
def test_infer_config(config: InternViTConfig) -> None:
    weights = random_weights(config)
    for layout in layouts_of(config):
        assert infer_config({f"x.{k}": v for k, v in convert_state_dict(weights, layout).items()}) == config
    assert infer_config({key: tuple(value.shape) for key, value in weights.items()}) == config


def test_infer_config_of_published_variants() -> None:
    for name in ("internvit-6b-448px-v2.5", "internvit-300m-448px"):
        config = InternViTConfig.from_name(name)
        inferred = infer_config(config.parameter_shapes())
        unseen = {"name": name, "drop_path_rate": config.drop_path_rate}
        unseen |= {field: getattr(config, field) for field in ("initializer_factor", "initializer_range")}
        assert inferred.replace(**unseen) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"hidden_size": 96, "num_attention_heads": 3},
            "a multiple of head_dim=64 .* got width 96 and 9 patches; pass config",
        ),
        ({"image_size": (28, 14)}, "a square grid, got width 256 and 2 patches; pass config"),
        ({"num_hidden_layers": 0}, "encoder.layers.0.mlp.fc1.weight missing"),
    ],
)
def test_infer_config_asks_where_it_cannot_know(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_config(random_weights(PLAIN.replace(**change)))


# ---- shapes that are no InternViT's ----


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (
            "patch_embedding.weight",
            (256, 3, 2, 14, 14),
            r"with 4 dimensions, got \(256, 3, 2, 14, 14\); .* video model",
        ),
        ("patch_embedding.weight", (256, 588), r"with 4 dimensions, got \(256, 588\); .* by a Linear"),
        ("patch_embedding.weight", (256, 3, 14, 16), "expected square patches, got 14x16"),
        ("patch_embedding.weight", (0,), r"with 4 dimensions, got \(0,\); an empty parameter .* ZeRO-3"),
        ("position_embedding", (10, 256), r"position_embedding with 3 dimensions, got \(10, 256\)"),
        ("position_embedding", (1, 0, 256), "a square grid, got width 256 and -1 patches"),
        ("class_embedding", (0,), "ZeRO-3"),
    ],
)
def test_infer_config_says_what_is_odd(name: str, shape: tuple, message: str) -> None:
    shapes = {**PLAIN.parameter_shapes(), f"embeddings.{name}": shape}
    with pytest.raises(ValueError, match=message):
        infer_config(shapes)
    with pytest.raises(ValueError, match=message):
        infer_config({f"vision_model.{key}": value for key, value in shapes.items()})


def test_zero3_shapes_are_named_with_a_config_too() -> None:
    weights = {name: torch.zeros(0) for name in PLAIN.parameter_shapes()}
    with pytest.raises(ValueError, match=r"wrong shapes: .*ZeRO-3 has partitioned: gather them first"):
        convert_state_dict(weights, config=PLAIN)
    with pytest.raises(ValueError, match="ZeRO-3"):
        infer_config(weights)


def test_a_cycle_of_dicts_is_an_error() -> None:
    cycle: dict = {}
    cycle["state_dict"] = cycle
    with pytest.raises(ValueError, match="or a cycle"):
        convert_state_dict(cycle)
    deep: dict = random_weights(PLAIN)
    for _ in range(3):
        deep = {"module": deep}
    assert_same(convert_state_dict(deep), random_weights(PLAIN))
