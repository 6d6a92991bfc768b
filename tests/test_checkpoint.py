"""Checkpoints: every form loads exactly and strictly, broken ones are a clear error, saves are atomic."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from internvit import checkpoint
from internvit.checkpoint import load_pretrained, save_pretrained
from internvit.config import VARIANTS, InternViTConfig
from internvit.convert import convert_state_dict
from internvit.modeling import InternViT
from tests.strategies import random_weights

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


# ---- round trips and forms ----


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
    with pytest.raises(ValueError, match=r"dtype: expected a floating-point torch\.dtype or None, got torch\.int8"):
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


# ---- broken checkpoints ----


@pytest.fixture
def saved(tmp_path) -> Path:
    """A sharded checkpoint of PLAIN."""
    return save_pretrained(make_model(PLAIN), tmp_path / "saved", max_shard_size="1MB")


def edit(folder: Path, **changes: Tensor | None) -> Path:
    """One file with some tensors changed, or taken away."""
    weights = {**random_weights(PLAIN), **{key.replace("__", "."): value for key, value in changes.items()}}
    folder.mkdir()
    save_file({key: value for key, value in weights.items() if value is not None}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(PLAIN.to_dict()))
    return folder


def test_missing_unexpected_and_wrong_shaped_are_one_error(tmp_path) -> None:
    folder = edit(
        tmp_path / "x",
        encoder__layers__0__ls1=None,
        encoder__layers__2__ls1=torch.zeros(256),
        encoder__layers__0__extra=torch.zeros(1),
        encoder__layers__1__mlp__fc1__bias=torch.zeros(47),
    )
    with pytest.raises(ValueError, match="missing keys: encoder.layers.0.ls1; unexpected keys: ") as error:  # noqa: RUF043
        load_pretrained(InternViT, folder)
    message = str(error.value)
    assert str(folder) in message
    assert "unexpected keys: encoder.layers.0.extra, encoder.layers.2.ls1" in message
    assert "wrong shapes: encoder.layers.1.mlp.fc1.bias (expected (48,), got (47,))" in message


def test_long_lists_are_cut(tmp_path) -> None:
    folder = edit(tmp_path / "x")
    with pytest.raises(ValueError, match=r"missing keys: encoder\.layers\.2\..*, \.\.\. \(14 in all\)") as error:
        load_pretrained(InternViT, folder, config=PLAIN.replace(num_hidden_layers=3))
    assert str(error.value).count("encoder.layers.2") == 10


def test_another_grid_says_what_to_do(tmp_path) -> None:
    folder = edit(tmp_path / "x")
    with pytest.raises(ValueError, match="with a config of the image_size it was made for; resize_pos_embeddings"):
        load_pretrained(InternViT, folder, config=PLAIN.replace(image_size=56))
    loaded = load_pretrained(InternViT, folder)
    loaded.resize_pos_embeddings(42, 56)
    assert loaded.embeddings.position_embedding.shape == (1, 17, 256)


def test_not_strict(tmp_path, caplog) -> None:
    folder = edit(tmp_path / "x", encoder__layers__0__ls1=None, encoder__layers__0__extra=torch.zeros(1))
    model = load_pretrained(InternViT, folder, strict=False, dtype=torch.float64)
    assert "missing keys: encoder.layers.0.ls1" in caplog.text
    assert "unexpected keys: encoder.layers.0.extra" in caplog.text
    expected = {name: tensor.double() for name, tensor in random_weights(PLAIN).items()}
    expected["encoder.layers.0.ls1"] = torch.full((256,), PLAIN.initializer_factor).double()
    assert_loaded(model, expected)
    wrong = edit(tmp_path / "y", encoder__layers__0__ls1=torch.zeros(3))
    with pytest.raises(ValueError, match="wrong shapes: encoder.layers.0.ls1"):  # noqa: RUF043
        load_pretrained(InternViT, wrong, strict=False)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth"])
def test_truncated_files(tmp_path, name: str, keep: float) -> None:
    path = tmp_path / name
    weights = random_weights(PLAIN)
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep) if 0 < keep < 1 else keep])
    with pytest.raises(ValueError, match="not a whole") as error:
        load_pretrained(InternViT, path)
    assert str(path) in str(error.value)


class Payload:
    """An object whose unpickling runs code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused(tmp_path, zipped: bool) -> None:
    path, proof = tmp_path / "x.pth", tmp_path / "it ran"
    content = {**random_weights(PLAIN), "hook": Payload(proof)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="holds pickled objects other than tensors, and reading them could run code"):
        load_pretrained(InternViT, path)
    assert not proof.exists()
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"x\.pth"):
        load_pretrained(InternViT, path)
    assert not proof.exists()


def test_missing_shard(saved: Path) -> None:
    next(saved.glob("model-00002-of-*")).unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-.*no such file; the checkpoint is not complete"):
        load_pretrained(InternViT, saved)


def test_shard_without_its_key(saved: Path) -> None:
    shard = next(saved.glob("model-00002-of-*"))
    tensors = load_file(shard)
    key = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != key}, shard)
    with pytest.raises(ValueError, match=f"expected to hold {key}, as the index says"):
        load_pretrained(InternViT, saved)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"cls_token": "../../etc/passwd"}}'])
def test_broken_index(saved: Path, index: str) -> None:
    (saved / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json: (not an index|expected file names)"):
        load_pretrained(InternViT, saved)


def test_shards_without_index(saved: Path) -> None:
    (saved / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"expected one file of weights or an index of them, got model-00001-of"):
        load_pretrained(InternViT, saved)


def test_weights_that_are_no_internvit(tmp_path) -> None:
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="expected the keys of an InternViT") as error:
        load_pretrained(InternViT, tmp_path)
    assert str(tmp_path) in str(error.value)
    torch.save([1, 2], tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: state dict: expected a dict of tensors, got list"):
        load_pretrained(InternViT, tmp_path / "x.pth")
    (tmp_path / "x.pth").write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"x\.pth: .* or it is no file of torch\.save"):
        load_pretrained(InternViT, tmp_path / "x.pth")


def test_integer_weights(tmp_path) -> None:
    folder = edit(tmp_path / "x", encoder__layers__0__ls1=torch.zeros(256, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"expected encoder\.layers\.0\.ls1 in floating point, got torch\.int8"):
        load_pretrained(InternViT, folder)


def test_empty_folder_and_no_such_path(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_pretrained(InternViT, tmp_path)
    for name in (tmp_path / "nowhere", "nowhere", "./a/b/c", "some/model.safetensors"):
        with pytest.raises(FileNotFoundError, match="is no file or folder, no hub id"):
            load_pretrained(InternViT, name)


# ---- the hub ----


@pytest.fixture
def hub(saved: Path, tmp_path, monkeypatch) -> list[str]:
    """A hub that serves `saved` as any repository; the list is what was asked for."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []
    cache = tmp_path / "cache"
    cache.mkdir()

    def snapshot_download(repository: str, *, allow_patterns: list[str], **options) -> str:
        asked.append(f"{repository}@{options['revision']}")
        for path in saved.iterdir():
            if any(path.match(pattern) for pattern in allow_patterns):
                (cache / path.name).write_bytes(path.read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_id_and_registry_name(hub: list[str]) -> None:
    for name, repository in (
        ("owner/some-vit", "owner/some-vit"),
        ("internvit-300m-448px", "OpenGVLab/InternViT-300M-448px"),
    ):
        assert_loaded(load_pretrained(InternViT, name, revision="v1"), random_weights(PLAIN))
        assert hub[-1] == f"{repository}@v1"


def test_hub_fetches_only_the_towers_shards(hub: list[str], saved: Path, tmp_path) -> None:
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    index["weight_map"] = {f"vision_model.{key}": name for key, name in index["weight_map"].items()}
    index["weight_map"]["language_model.lm_head.weight"] = "model-language.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    for shard in saved.glob("*.safetensors"):
        save_file({f"vision_model.{key}": value for key, value in load_file(shard).items()}, shard)
    (saved / "model-language.safetensors").write_bytes(b"many gigabytes")
    assert_loaded(load_pretrained(InternViT, "owner/whole-internvl"), random_weights(PLAIN))
    assert "model-language.safetensors" not in names(tmp_path / "cache")


def test_hub_errors(monkeypatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs) -> None:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        OSError, match=r"OpenGVLab/InternViT-6B-224px could not be fetched .*no network.*give the folder"
    ):
        load_pretrained(InternViT, "internvit-6b-224px")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'internvit\[hub\]', or give a local folder"):
        load_pretrained(InternViT, "internvit-6b-224px")


# ---- saving ----


def test_weights_are_not_overwritten_unasked(tmp_path) -> None:
    first, second = make_model(PLAIN, seed=1), make_model(PLAIN, seed=2)
    save_pretrained(first, tmp_path)
    with pytest.raises(FileExistsError, match="holds weights; pass overwrite=True to replace them"):
        save_pretrained(second, tmp_path)
    assert_loaded(load_pretrained(InternViT, tmp_path), first.state_dict())
    save_pretrained(second, tmp_path, overwrite=True)
    assert_loaded(load_pretrained(InternViT, tmp_path), second.state_dict())
    for name, is_weights in (("pytorch_model.bin", True), ("x.safetensors", True), ("rng_state.pth", False)):
        (tmp_path / name[:3]).mkdir()
        (tmp_path / name[:3] / name).write_bytes(b"")
        if is_weights:
            with pytest.raises(FileExistsError):
                save_pretrained(first, tmp_path / name[:3])
        else:
            save_pretrained(first, tmp_path / name[:3])


@pytest.mark.parametrize("before", ["5GB", "600KB", "1MB"])
@pytest.mark.parametrize("after", ["5GB", "600KB"])
def test_overwriting_leaves_no_stale_file(tmp_path, before: str, after: str) -> None:
    first, second = make_model(PLAIN, seed=1), make_model(PLAIN, seed=2)
    save_pretrained(first, tmp_path, max_shard_size=before)
    (tmp_path / ".model-00001-of-00002.safetensors.1.writing").write_bytes(b"of a save that was killed")
    (tmp_path / "model-3-00001-of-00007.safetensors").write_bytes(b"of a save that was killed")
    (tmp_path / "notes.txt").write_text("not ours")
    save_pretrained(second, tmp_path, max_shard_size=after, overwrite=True)
    expected = {"config.json", "notes.txt"}
    if after == "5GB":
        expected |= {"model.safetensors"}
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        expected |= {"model.safetensors.index.json", *index["weight_map"].values()}
    assert names(tmp_path) == expected
    assert_loaded(load_pretrained(InternViT, tmp_path), second.state_dict())


@pytest.mark.parametrize("before", ["5GB", "600KB"])
@pytest.mark.parametrize("after", ["5GB", "600KB"])
def test_interrupted_save_leaves_a_whole_checkpoint(tmp_path, monkeypatch, before: str, after: str) -> None:
    first, second = make_model(PLAIN, seed=1), make_model(PLAIN, seed=2)
    state = {"steps": 0, "fail at": 0}

    def interrupted(real):
        def step(*args, **kwargs):
            state["steps"] += 1
            if state["steps"] == state["fail at"]:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return step

    monkeypatch.setattr(checkpoint, "save_file", interrupted(checkpoint.save_file))
    monkeypatch.setattr(os, "replace", interrupted(os.replace))
    monkeypatch.setattr(os, "fsync", interrupted(os.fsync))
    unlink, unlink_step = Path.unlink, interrupted(Path.unlink)
    monkeypatch.setattr(Path, "unlink", lambda p, **kw: (unlink if p.name[0] == "." else unlink_step)(p, **kw))
    outcomes = []
    for fail_at in range(1, 100):
        folder = tmp_path / str(fail_at)
        state |= {"steps": 0, "fail at": 0}
        save_pretrained(first, folder, max_shard_size=before)
        state |= {"steps": 0, "fail at": fail_at}
        try:
            save_pretrained(second, folder, max_shard_size=after, overwrite=True)
        except KeyboardInterrupt:
            pass
        else:
            break
        loaded = load_pretrained(InternViT, folder)
        new = torch.equal(loaded.encoder.layers[0].ls1, second.encoder.layers[0].ls1)
        assert_loaded(loaded, (second if new else first).state_dict())
        assert not [name for name in names(folder) if name.startswith(".")]
        outcomes.append(new)
    assert outcomes == sorted(outcomes)  # old up to some step, new from there on
    assert not outcomes[0]


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch) -> None:
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(make_model(PLAIN), tmp_path)
    assert names(tmp_path) == set()


def test_shared_and_strided_parameters(tmp_path) -> None:
    model = make_model(PLAIN)
    layers = model.encoder.layers
    layers[1].ls1 = layers[0].ls1
    layers[0].mlp.fc1.weight = nn.Parameter(torch.randn(256, 48).t())
    flat = torch.randn(3 * 256)
    layers[0].norm1.weight, layers[0].norm1.bias = nn.Parameter(flat[:256]), nn.Parameter(flat[128:384])
    save_pretrained(model, tmp_path)
    assert_loaded(load_pretrained(InternViT, tmp_path), {k: v.clone() for k, v in model.state_dict().items()})


def test_save_refuses(tmp_path) -> None:
    model = make_model(PLAIN)
    with pytest.raises(ValueError, match="layout: expected one of opengvlab, transformers, timm, mmseg, got 'hf'"):
        save_pretrained(model, tmp_path, layout="hf")
    for size in ("5 parsecs", "", 0, -1, True, 1.5, "0GB"):
        with pytest.raises(ValueError, match="max_shard_size: expected bytes or a string such as '5GB'"):
            save_pretrained(model, tmp_path, max_shard_size=size)
    model.config = PLAIN.replace(num_hidden_layers=3)
    with pytest.raises(ValueError, match="missing keys"):
        save_pretrained(model, tmp_path)
    model.config = {"hidden_size": 256}
    with pytest.raises(ValueError, match="expected its config to be an InternViTConfig, got dict"):
        save_pretrained(model, tmp_path)
    assert names(tmp_path) == set()


def test_sizes() -> None:
    sizes = {"5GB": 5_000_000_000, "500kb": 500_000, "1.5 MiB": 1_572_864, "7B": 7, 12: 12}
    assert {size: checkpoint._bytes(size) for size in sizes} == sizes


def test_without_tqdm(saved: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert_loaded(load_pretrained(InternViT, saved), random_weights(PLAIN))


# ---- true widths ----

MEASURE = """
import sys, torch
from pathlib import Path
from internvit.checkpoint import load_pretrained
from internvit.modeling import InternViT

def memory(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024

load_pretrained(InternViT, sys.argv[1])  # imports on demand, allocator
before = memory("VmRSS")  # anonymous and file-mapped pages
model = load_pretrained(InternViT, sys.argv[2])
peak = memory("VmHWM") - before
checks = {n: int(p.detach().view(torch.int16).view(-1).to(torch.int64).sum()) for n, p in model.named_parameters()}
print(peak, sorted(checks.items()))
"""


def six_billion_shards(folder: Path, config: InternViTConfig, form: str) -> tuple[int, list[tuple[str, int]]]:
    """Writes a bf16 checkpoint of arbitrary bits; its size in bytes and the sum of every parameter's bits."""
    start = int(torch.randint(0, 1000, ()))
    weights = {}
    for position, (name, shape) in enumerate(config.parameter_shapes().items()):
        count = torch.Size(shape).numel()
        weights[name] = torch.arange(start + position, start + position + count).to(torch.int16).view(shape)
    checks = sorted((name, int(tensor.view(-1).to(torch.int64).sum())) for name, tensor in weights.items())
    weights = {name: tensor.view(torch.bfloat16) for name, tensor in weights.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    if form == "pth":
        torch.save({"module": convert_state_dict(weights, "mmseg")}, folder / "intern_vit_6b.pth")
    else:
        split = convert_state_dict(weights, "transformers" if form == "split" else "opengvlab")
        items = [(key, tensor.clone()) for key, tensor in split.items()]
        cut = len(items) // 2
        weight_map = {}
        for shard, part in enumerate((items[:cut], items[cut:])):
            name = f"model-0000{shard + 1}-of-00002.safetensors"
            save_file(dict(part), folder / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys((key for key, _ in part), name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(tensor.nbytes for tensor in weights.values()), checks


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("form", ["shards", "split", "pth"])
def test_peak_memory_of_6b(tmp_path, form: str) -> None:
    config = VARIANTS["internvit-6b-448px-v2.5"].replace(num_hidden_layers=2)
    size, checks = six_billion_shards(tmp_path / "big", config, form)
    save_pretrained(make_model(QK_NORM), tmp_path / "small")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "big")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, found = result.stdout.strip().split(" ", 1)
    print(f"{form}: peak extra memory {int(peak) / size:.3f} of the checkpoint's {size / 2**20:.0f} MiB")
    assert found == str(checks)
    assert int(peak) <= 1.2 * size


@pytest.mark.slow
def test_full_depth_6b(tmp_path) -> None:
    """11 GB of bf16 in two sparse files of the true shape, planned, compared and built on the meta device."""
    config = VARIANTS["internvit-6b-448px-v2.5"]
    shapes = list(config.parameter_shapes().items())
    weight_map = {}
    for shard, part in enumerate((shapes[: len(shapes) // 2], shapes[len(shapes) // 2 :])):
        header, end = {}, 0
        for name, shape in part:
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
            weight_map[name] = f"model-{shard}.safetensors"
        text = json.dumps(header).encode()
        with open(tmp_path / f"model-{shard}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    model = load_pretrained(InternViT, tmp_path, device="meta")
    assert model.config == config
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_536_496_000
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
