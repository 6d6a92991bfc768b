"""Every form of checkpoint loads exactly."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvit.checkpoint.load import load_pretrained
from internvit.checkpoint.save import save_pretrained
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.config import InternViTConfig
from internvit.model.vit import InternViT
from tests.checkpoint.models import CONFIGS, PLAIN, QK_NORM, assert_loaded, make_model, names
from tests.support.strategies import random_weights


@pytest.mark.parametrize("layout", ["opengvlab", "transformers", "timm", "mmseg"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "500KB"])
@CONFIGS
def test_save_and_load(tmp_path, layout: str, max_shard_size: str, config: InternViTConfig) -> None:
    if layout == "timm" and config.qk_normalization:
        with pytest.raises(ValueError, match="qk_norm is per head"):
            save_pretrained(make_model(config), tmp_path / "x", layout=layout)
        assert not (tmp_path / "x").exists()
        return
    model = make_model(config, torch.bfloat16)
    assert save_pretrained(model, tmp_path, layout=layout, max_shard_size=max_shard_size) == tmp_path
    shards = {name for name in names(tmp_path) if name.endswith(".safetensors")}
    if max_shard_size == "5GB":
        assert names(tmp_path) == {"config.json", "model.safetensors"}
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert len(shards) > 2
        assert set(index["weight_map"].values()) == shards
        assert index["metadata"]["total_size"] == 2 * config.num_parameters()
        assert all(sum(t.nbytes for t in load_file(tmp_path / shard).values()) <= 500_000 for shard in shards)
    stored = {key: value for shard in shards for key, value in load_file(tmp_path / shard).items()}
    assert stored.keys() == convert_state_dict(model.state_dict(), layout).keys()
    loaded = load_pretrained(InternViT, tmp_path)
    assert_loaded(loaded, model.state_dict())
    assert loaded.config == config
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def write_pth(path: Path, weights: dict[str, Tensor], **options) -> Path:
    torch.save({"module": convert_state_dict(weights, "mmseg"), "epoch": 3}, path, **options)
    return path


@pytest.mark.parametrize("form", ["safetensors", "pth", "old pth", "bin folder", "bin shards", "odd name", "backbone"])
@pytest.mark.parametrize("with_config", [True, False])
@CONFIGS
def test_forms(tmp_path, form: str, with_config: bool, config: InternViTConfig) -> None:
    weights = random_weights(config)
    theirs = {f"model.vision_tower.{k}": v for k, v in convert_state_dict(weights, "transformers").items()}
    path = tmp_path
    if form == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file({key: value.clone() for key, value in theirs.items()}, path)
    elif form == "pth":
        path = write_pth(tmp_path / "intern_vit.pth", weights)
    elif form == "old pth":
        path = write_pth(tmp_path / "intern_vit.pth", weights, _use_new_zipfile_serialization=False)
    elif form == "bin folder":
        torch.save(theirs, tmp_path / "pytorch_model.bin")
        torch.save({"lr": 1}, tmp_path / "training_args.bin")
    elif form == "bin shards":
        half = len(theirs) // 2
        weight_map = {}
        for shard in range(2):
            part = dict(list(theirs.items())[shard * half : len(theirs) if shard else half])
            torch.save(part, tmp_path / f"pytorch_model-{shard}.bin")
            weight_map |= dict.fromkeys(part, f"pytorch_model-{shard}.bin")
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif form == "odd name":
        save_file(weights, tmp_path / "weights.fp32.safetensors")
    else:
        path = tmp_path / "segmentor.pth"
        backbone = {f"backbone.{key}": value for key, value in convert_state_dict(weights, "mmseg").items()}
        torch.save({"state_dict": {**backbone, "decode_head.conv_seg.bias": torch.zeros(1)}}, path)
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(config.replace(drop_path_rate=0.25).to_dict()))
    model = load_pretrained(InternViT, path)
    assert_loaded(model, weights)
    assert model.config == (config.replace(drop_path_rate=0.25) if with_config else config)


def test_a_given_config_is_taken(tmp_path) -> None:
    model = make_model(PLAIN)
    save_pretrained(model, tmp_path)
    config = PLAIN.replace(num_attention_heads=8, drop_path_rate=0.5)
    loaded = load_pretrained(InternViT, str(tmp_path), config=config)
    assert loaded.config == config
    assert_loaded(loaded, model.state_dict())


def test_dtype_and_device(tmp_path) -> None:
    model = make_model(QK_NORM)
    save_pretrained(model, tmp_path, layout="transformers")
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert_loaded(load_pretrained(InternViT, tmp_path, dtype=torch.bfloat16, device="cpu"), weights)
    meta = load_pretrained(InternViT, tmp_path, device="meta", dtype=torch.float16)
    assert all(p.is_meta and p.dtype == torch.float16 for p in meta.parameters())
    write_pth(tmp_path / "x.pth", model.state_dict())
    for path in (tmp_path, tmp_path / "x.pth"):
        with torch.device("meta"):
            assert all(p.is_meta for p in load_pretrained(InternViT, path).parameters())
            loaded = load_pretrained(InternViT, path, device="cpu")
        assert_loaded(loaded, model.state_dict())
    with pytest.raises(ValueError, match=r"dtype: expected a floating-point torch\.dtype of 16 .* got torch\.int8"):
        load_pretrained(InternViT, tmp_path, dtype=torch.int8)
    with pytest.raises(ValueError, match="model: expected weights, got parameters on the meta device"):
        save_pretrained(meta, tmp_path / "meta")


@pytest.mark.gpu
def test_straight_to_a_gpu(tmp_path) -> None:
    model = make_model(QK_NORM)
    save_pretrained(model, tmp_path, layout="transformers", max_shard_size="500KB")
    loaded = load_pretrained(InternViT, tmp_path, device="cuda", dtype=torch.bfloat16)
    weights = {name: tensor.to("cuda", torch.bfloat16) for name, tensor in model.state_dict().items()}
    assert_loaded(loaded, weights)
    assert loaded.device.type == "cuda"
    save_pretrained(loaded, tmp_path / "again")
    assert_loaded(load_pretrained(InternViT, tmp_path / "again", device="cuda"), weights)


def test_features_survive(tmp_path) -> None:
    model = make_model(PLAIN).eval()
    pixels = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    model.save_pretrained(tmp_path, layout="transformers", max_shard_size=500_000)
    with torch.no_grad():
        assert torch.equal(InternViT.from_pretrained(tmp_path)(pixels).last_hidden_state, expected)


def test_the_loaded_model_owns_its_memory(tmp_path) -> None:
    weights = random_weights(PLAIN)
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "model.pth")
    for name in ("model.safetensors", "model.pth"):
        model = load_pretrained(InternViT, tmp_path / name)
        (tmp_path / name).write_bytes(b"\0" * (tmp_path / name).stat().st_size)  # in place: a mapping would see it
        assert_loaded(model, weights)


# ---- transformers and timm ----


@CONFIGS
def test_from_and_to_transformers(tmp_path, config: InternViTConfig) -> None:
    transformers = pytest.importorskip("transformers")
    config = config.replace(pos_embed_mode="param_dtype", qk_norm_eps=1e-6)
    model = make_model(config, torch.bfloat16)
    save_pretrained(model, tmp_path / "ours", layout="transformers", max_shard_size="700KB")
    theirs, info = transformers.InternVLVisionModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert theirs.dtype == torch.bfloat16
    expected = convert_state_dict(model.state_dict(), "transformers")
    assert all(torch.equal(theirs.state_dict()[key], expected[key]) for key in expected)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_pretrained(InternViT, tmp_path / "theirs")
    assert_loaded(loaded, model.state_dict())
    assert loaded.config == config


def test_from_a_whole_internvl_of_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    vision = PLAIN.to_dict("transformers")
    text = {
        "model_type": "qwen2",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    text |= {"num_key_value_heads": 2, "intermediate_size": 32}
    theirs = transformers.InternVLForConditionalGeneration(
        transformers.InternVLConfig(vision_config=vision, text_config=text, image_token_id=1)
    )
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    tower = theirs.model.vision_tower
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in set(index.values()) - {file for key, file in index.items() if "vision_tower" in key}:
        (tmp_path / name).unlink()  # shards of the language model alone are not looked at
    assert_loaded(load_pretrained(InternViT, tmp_path), convert_state_dict(tower.state_dict()))


def test_from_timm(tmp_path) -> None:
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    theirs = vision_transformer.VisionTransformer(
        img_size=42, patch_size=14, embed_dim=256, depth=2, num_heads=4, mlp_ratio=48 / 256, init_values=0.1,
        final_norm=False, num_classes=7,
    )  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    weights = convert_state_dict(theirs.state_dict())
    assert_loaded(load_pretrained(InternViT, tmp_path), weights)
    model_args = {"patch_size": 14, "embed_dim": 256, "depth": 2, "num_heads": 4, "mlp_ratio": 48 / 256, "img_size": 42}
    hub = {"architecture": "vit_intern300m_patch14_448", "model_args": model_args, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(hub))
    loaded = load_pretrained(InternViT, tmp_path)
    assert_loaded(loaded, weights)
    assert loaded.config.pos_embed_mode == "antialias"
