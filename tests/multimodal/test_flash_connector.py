"""InternVL3.5-Flash's connector against a restatement of OpenGVLab's code, and its checkpoints."""

import copy
import json
import logging

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from internvit import InternViT, InternVLConnector, InternVLFlashConnector, InternVLFlashOutput
from internvit.data import Embedder
from internvit.multimodal.connector import pixel_shuffle
from internvit.multimodal.load import load_connector
from internvit.multimodal.router import CrossAttentionPooling, tiles_to_compress
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, images, random_weights
from tests.support.upstream.opengvlab_flash import InternVLFlashChatModel, Pooling

CONFIG = CONFIGS["tiny-layer_norm"]
THRESHOLDS = {"flash_relative_threshold": 0.25, "flash_absolute_threshold": 0.3}
LLM = 40


@pytest.fixture
def chat() -> InternVLFlashChatModel:
    model = InternVLFlashChatModel(CONFIG, LLM, 16, *THRESHOLDS.values()).eval()
    random_weights(model)
    return model


def connector_of(chat: InternVLFlashChatModel, **settings) -> InternVLFlashConnector:
    return InternVLFlashConnector.from_state_dict(chat.state_dict(), **{**THRESHOLDS, **settings})


def tower_of(chat: InternVLFlashChatModel) -> InternViT:
    tower = InternViT(CONFIG).eval()
    tower.load_state_dict(chat.vision_model.state_dict())
    return tower


def test_features_and_gradients_are_upstreams(chat, generator) -> None:
    connector, pixels = connector_of(chat), images(CONFIG, 7)
    tokens = torch.randn(2, 17, 96, generator=generator)
    expected, compress = chat.flash_features(pixels)
    out = connector.extract_feature(tower_of(chat), pixels)
    assert isinstance(out, InternVLFlashOutput)
    assert torch.equal(out.compress, compress)
    assert out.token_counts == tuple(map(len, expected))
    assert set(out.token_counts) <= {1, 4}, "the grid of 4 x 4 patches, shuffled by 4 and by 2"
    for part, theirs in zip(out.image_tokens.split(out.token_counts), expected, strict=True):
        assert relative_error(part, theirs) <= 1e-5
    (torch.cat(expected).square().mean() + chat.route(tokens[:, 1:])[2].sum()).backward()
    logits = connector(tokens).router_logits
    (out.image_tokens.square().mean() + logits.softmax(-1)[:, 0].sum()).backward()
    for name, p in connector.named_parameters():
        theirs = chat.get_parameter(name).grad
        if theirs is None:
            assert p.grad is None or not p.grad.any(), name
        else:
            assert relative_error(p.grad, theirs) <= 1e-4, name


@pytest.mark.parametrize(
    ("width", "tokens"), [(64, 1), (400, 257), (1024, 3), pytest.param(3200, 3, marks=pytest.mark.slow)]
)
def test_pooling_without_keys_and_values(width, tokens, generator) -> None:
    ours, theirs = CrossAttentionPooling(width), Pooling(width, 16)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, tokens, width, generator=generator)
    x[..., 3] *= 50
    exact = copy.deepcopy(theirs).double()(list(x.double()))
    assert relative_error(ours(x).squeeze(1), exact) <= 1e-5
    with torch.no_grad():
        rounded = [m.bfloat16()(t) for m, t in ((ours, x.bfloat16()), (theirs, list(x.bfloat16())))]
    exact = copy.deepcopy(theirs).double()(list(x.bfloat16().double()))
    ours_off, theirs_off = (relative_error(out.reshape(exact.shape), exact) for out in rounded)
    assert ours_off <= max(1.2 * theirs_off, 2e-2)


def test_the_second_attention_runs_three_times(chat, generator) -> None:
    pooling = connector_of(chat).pooling_before_gating
    x = torch.randn(2, 5, 96, generator=generator)
    before = pooling(x)
    for unused in ("attn3.in_proj_weight", "norm3.weight", "attn4.out_proj.weight", "norm4.bias"):
        parameter = pooling.get_parameter(unused)
        parameter.data.normal_()
        assert torch.equal(pooling(x), before)
        assert not parameter.requires_grad
    pooling.attn2.in_proj_weight.data.mul_(2)
    assert not torch.equal(pooling(x), before)


def test_a_hooked_or_replaced_attention_is_called(chat, generator) -> None:
    pooling = connector_of(chat).pooling_before_gating
    x, calls = torch.randn(3, 5, 96, generator=generator), []
    before = pooling(x)
    pooling.attn2.register_forward_hook(lambda *_: calls.append(1))
    assert relative_error(pooling(x), before) <= 1e-5
    assert len(calls) == 3


@pytest.mark.parametrize("part", ["mlp1", "mlp1.2", "mlp2", "gating.block2", "gating.block2.1"])
def test_hooks_of_every_part_run(part, chat, generator) -> None:
    connector, tokens, calls = connector_of(chat), torch.randn(3, 17, 96, generator=generator), []
    before = connector(tokens, compress=[True, False, True])
    connector.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    after = connector(tokens, compress=[True, False, True])
    assert calls == [part]
    assert relative_error(after.image_tokens, before.image_tokens) <= 1e-5


def test_another_gelu_is_not_taken_for_the_exact_one(chat, generator) -> None:
    plain, tokens = InternVLConnector.from_state_dict(chat.state_dict()), torch.randn(2, 17, 96, generator=generator)
    plain.mlp1[2] = torch.nn.GELU("tanh")
    folded = pixel_shuffle(tokens[:, 1:].view(2, 4, 4, 96)).flatten(1, 2)
    assert relative_error(plain(tokens), plain.mlp1(folded)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_is_routed_alike_alone_and_in_a_batch(dtype, generator) -> None:
    connector = InternVLFlashConnector(64, 48, 0.5, 0.0, dtype=dtype).eval()
    tokens = torch.randn(5, 1 + 16, 64, generator=generator).to(dtype)
    with torch.no_grad():
        whole = connector(tokens, num_tiles=(2, 3))
        for first, last in ((0, 2), (2, 5)):
            alone = connector(tokens[first:last])
            assert torch.equal(alone.router_logits, whole.router_logits[first:last])
            assert torch.equal(alone.compress, whole.compress[first:last])
            assert alone.token_counts == whole.token_counts[first:last]
        parts = whole.image_tokens.split(whole.token_counts)
        for i, tile in enumerate(tokens.split(1)):
            assert torch.equal(connector(tile, compress=whole.compress[i : i + 1]).image_tokens, parts[i])


def test_thresholds() -> None:
    p = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.2])
    for samples, relative, absolute, expected in (
        ([5], 0.0, 0.0, [1, 0, 1, 1, 1]),  # strictly more than the least of all
        ([5], 0.5, 0.0, [1, 0, 0, 1, 0]),
        ([5], 0.0, 0.7, [1, 0, 0, 1, 0]),
        ([1, 4], 0.5, 0.0, [0, 0, 1, 1, 0]),  # a sample's only tile keeps its tokens
        ([1, 0, 4], 1.0, 0.0, [0, 0, 0, 0, 0]),
    ):
        assert tiles_to_compress(p, samples, relative, absolute).tolist() == [bool(e) for e in expected]


@pytest.mark.parametrize("compress", [[True] * 3, [False] * 3, [True, False, True]])
def test_training_with_given_decisions(compress, generator) -> None:
    """Every parameter that has a gradient gets one, whichever branch the tiles take; dropout is on."""
    connector = InternVLFlashConnector(64, 48, 0.5, 0.5).train()
    tokens = torch.randn(3, 17, 64, generator=generator, requires_grad=True)
    out = connector(tokens, compress=compress)
    assert out.token_counts == tuple(1 if few else 4 for few in compress)
    loss = out.image_tokens.square().mean()
    loss += torch.nn.functional.cross_entropy(out.router_logits, torch.tensor([0, 1, 1]))
    loss.backward()
    for name, p in connector.named_parameters():
        assert (p.grad is not None) == p.requires_grad, name
    assert connector.gating.block1[0].weight.grad.any()
    assert connector.mlp2[1].weight.grad.any() == any(compress)
    assert connector.mlp1[1].weight.grad.any() != all(compress)
    assert not torch.equal(connector(tokens, compress=compress).router_logits, out.router_logits)


def test_no_tiles() -> None:
    connector = InternVLFlashConnector(64, 48, 0.5, 0.5)
    out = connector(torch.empty(0, 17, 64))
    assert out.image_tokens.shape == (0, 48)
    assert out.token_counts == ()
    assert out.router_logits.shape == (0, 2)


def test_errors() -> None:
    connector = InternVLFlashConnector(64, 48, 0.5, 0.5)
    tokens = torch.randn(2, 17, 64)
    for call, message in (
        (lambda: connector(torch.randn(2, 16, 64)), "InternVLFlashConnector: hidden_states.*give grid"),
        (lambda: connector(torch.randn(2, 5, 64)), "multiples of 4"),
        (lambda: connector(tokens, num_tiles=[1]), r"num_tiles must add up to 2 tiles, got \[1\]"),
        (lambda: connector(tokens, num_tiles=[3, -1]), "num_tiles"),
        (lambda: connector(tokens, compress=[1, 0]), r"compress must be bool \[2\], got torch.int64"),
        (lambda: connector(tokens, compress=[True]), r"compress must be bool \[2\]"),
        (lambda: InternVLFlashConnector(64, 48, 1.5, 0.5), "flash_relative_threshold must be a number in"),
        (lambda: InternVLFlashConnector(64, 48, 0.5, None), "flash_absolute_threshold"),
        (lambda: InternVLFlashConnector.from_state_dict(InternVLConnector(64, 48).state_dict(), **THRESHOLDS),
         r"mlp2\.\*, pooling_before_gating\.\*, gating\.\*.*found no mlp2\.0\.weight"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


@pytest.fixture
def folder(chat, tmp_path):
    """An InternVL3.5-Flash as upstream publishes it, with a config.json of a whole model."""
    vision = {**CONFIG.to_dict(), "architectures": ["InternVisionModel"]}
    config = {
        "model_type": "internvl_chat",
        "flash_mode": True,
        **THRESHOLDS,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
    }
    (tmp_path / "config.json").write_text(json.dumps({**config, "select_layer": -1, "vision_config": vision}))
    tensors = {**chat.state_dict(), "language_model.model.norm.weight": torch.ones(LLM)}
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(names.values()):
        save_file({key: t.contiguous() for key, t in tensors.items() if names[key] == name}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return tmp_path


def test_a_checkpoint(chat, folder, caplog) -> None:
    pixels = images(CONFIG, 5)
    expected, _ = chat.flash_features(pixels)
    connector, tower = load_connector(folder), InternViT.from_pretrained(folder)
    assert isinstance(connector, InternVLFlashConnector)
    assert not connector.training
    out = connector.extract_feature(tower, pixels)
    assert relative_error(out.image_tokens, torch.cat(expected)) <= 1e-5
    assert connector.state_dict().keys() == {k for k in chat.state_dict() if not k.startswith("vision_model.")}
    assert all(torch.equal(t, chat.state_dict()[k]) for k, t in connector.state_dict().items())
    with caplog.at_level(logging.WARNING):
        plain = InternVLConnector.from_pretrained(folder)
    assert "InternVL3.5-Flash" in caplog.text
    chat.select_layer = -1
    assert relative_error(plain.extract_feature(tower, pixels), chat.extract_feature(pixels)) <= 1e-5
    other = InternVLFlashConnector.from_pretrained(folder, flash_relative_threshold=1.0)
    assert set(other.extract_feature(tower, pixels).token_counts) == {4}
    config = json.loads((folder / "config.json").read_text())
    del config["flash_absolute_threshold"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"expected flash_absolute_threshold in config\.json"):
        load_connector(folder)


def test_transformers_names_of_mlp1(chat) -> None:
    connector = connector_of(chat)
    renamed = {
        **connector.state_dict(),
        **InternVLConnector.from_state_dict(chat.state_dict()).to_state_dict("transformers"),
    }
    renamed = {key: t for key, t in renamed.items() if not key.startswith("mlp1.")}
    tokens = torch.randn(3, 17, 96)
    expected = connector(tokens).image_tokens
    prefixed = {f"model.{key}": t for key, t in renamed.items()}
    assert torch.equal(InternVLFlashConnector.from_state_dict(prefixed, **THRESHOLDS)(tokens).image_tokens, expected)
    other = InternVLFlashConnector(96, LLM, **THRESHOLDS).eval()
    other.load_state_dict(renamed)
    assert torch.equal(other(tokens).image_tokens, expected)


def test_features_of_images(chat, folder, generator) -> None:
    """The embedder routes among the tiles of an image, whichever batches they were in."""
    pictures = [torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator).numpy()
                for size in ((60, 170), (56, 56), (120, 60))]  # fmt: skip
    embed = Embedder(folder, connector=folder, pooling="connector", size=56, tiles=6, batch=2)
    assert embed.shape == (None, LLM)
    tower, connector = InternViT.from_pretrained(folder), load_connector(folder)
    for picture, features in zip(pictures, embed({"image": pictures})["features"], strict=True):
        tiles = torch.from_numpy(embed.preprocess(picture)).permute(0, 3, 1, 2)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        with torch.no_grad():
            expected = connector.extract_feature(tower, (tiles / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        assert features.shape == (sum(expected.token_counts), LLM)
        assert relative_error(torch.from_numpy(features), expected.image_tokens) <= 1e-4
    other = Embedder(folder, connector=connector_of(chat, flash_relative_threshold=0.5), pooling="connector", size=56)
    assert other.settings()["connector_digest"] == embed.settings()["connector_digest"]
    assert other.settings()["connector"] != embed.settings()["connector"]


def test_features_by_the_command_line(folder, tmp_path, generator) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
    pytest.importorskip("click", reason="the cli extra is not installed")
    from click.testing import CliRunner

    from internvit.cli.app import cli

    (tmp_path / "photos").mkdir()
    for i, size in enumerate(((60, 170, 3), (56, 56, 3))):
        pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    arguments = ["--weights", folder, "--pooling", "connector", "--connector", folder, "--size", 56, "--tiles", 6]
    done = CliRunner().invoke(
        cli, ["features", *map(str, (tmp_path / "photos", *arguments, "--out", tmp_path / "out"))]
    )
    assert done.exit_code == 0, done.output
    (shard,) = (tmp_path / "out" / "data").glob("*.parquet")
    rows = sorted(parquet.read_table(shard).to_pylist(), key=lambda row: row["path"])
    embed = Embedder(folder, connector=folder, pooling="connector", size=56, tiles=6)
    expected = embed({"path": sorted(map(str, (tmp_path / "photos").iterdir()))})["features"]
    for row, features in zip(rows, expected, strict=True):
        stored = torch.tensor(row["features"])
        assert relative_error(stored.reshape(-1, LLM), torch.from_numpy(features)) <= 1e-6
