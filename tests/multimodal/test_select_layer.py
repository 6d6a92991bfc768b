"""The hidden state that a connector was trained on, `select_layer` of config.json, is what every door gives it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from internvit import InternViT, InternVLConnector, InternVLFlashConnector
from internvit.data import Embedder
from internvit.export.program import ExportedModel, export_program
from internvit.images import normalize
from internvit.multimodal.load import load_connector
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, images, random_weights
from tests.support.upstream.opengvlab import InternVLChatModel

CONFIG = CONFIGS["tiny-layer_norm"]
FLASH = {"flash_mode": True, "flash_relative_threshold": 0.5, "flash_absolute_threshold": 0.1}


@pytest.fixture
def chat() -> InternVLChatModel:
    model = InternVLChatModel(CONFIG, llm_hidden_size=40).eval()
    random_weights(model)
    return model


def save(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    """A whole InternVL's folder."""
    config = {"model_type": "internvl_chat", "vision_config": CONFIG.to_dict(), **settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(("name", "select_layer"), [("select_layer", -2), ("vision_feature_layer", 1)])
def test_every_door_takes_the_state_of_config_json(chat, tmp_path, seed, name, select_layer) -> None:
    folder = save(tmp_path, chat.state_dict(), ps_version="v2", **{name: select_layer})
    pixels = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 56, 56, 3), np.uint8))
    with torch.no_grad():
        last = chat.extract_feature(normalize(pixels))
        chat.select_layer = select_layer
        expected = chat.extract_feature(normalize(pixels))
    assert relative_error(last, expected) > 0.01
    connector, tower = InternVLConnector.from_pretrained(folder), InternViT.from_pretrained(folder)
    assert connector.select_layer == select_layer
    embed = Embedder(folder, pooling="connector", connector=folder, device="cpu")
    exported = ExportedModel(tower, connector=connector)
    with torch.no_grad():
        given = {
            "extract_feature": connector.extract_feature(tower, normalize(pixels)),
            "Embedder": torch.from_numpy(embed({"image": pixels.numpy()})["features"]),
            "ExportedModel": exported(normalize(pixels))[0],
        }
        overridden = connector.extract_feature(tower, normalize(pixels), -1)
    for door, tokens in given.items():
        assert relative_error(tokens, expected) <= 1e-5, door
    assert relative_error(overridden, last) <= 1e-5
    assert f"select_layer={select_layer}" in embed.settings()["connector"]
    chosen = Embedder(folder, pooling="connector", connector=folder, layers=(-1,), device="cpu")
    assert relative_error(torch.from_numpy(chosen({"image": pixels.numpy()})["features_2"]), last) <= 1e-5


@pytest.mark.sampled(2)
def test_a_program_takes_it(chat) -> None:
    tower = InternViT(CONFIG).eval()
    tower.load_state_dict(chat.vision_model.state_dict())
    connector = InternVLConnector.from_state_dict(chat.state_dict(), select_layer=-2)
    chat.select_layer = -2
    program = export_program(ExportedModel(tower, connector=connector), CONFIG.image_hw, 1).module()
    pixels = images(CONFIG, 1)
    assert relative_error(program(pixels)[0], chat.extract_feature(pixels)) <= 1e-5


def test_a_flash_connector_takes_it_too(tmp_path, seed) -> None:
    tower = InternViT(CONFIG).eval()
    random_weights(tower)
    made = InternVLFlashConnector(96, 40, 0.5, 0.1).eval()
    tensors = {**{f"vision_model.{k}": t for k, t in tower.state_dict().items()}, **made.state_dict()}
    folder = save(tmp_path, tensors, **FLASH, select_layer=-2)
    connector = load_connector(folder)
    assert isinstance(connector, InternVLFlashConnector)
    pixels = images(CONFIG, 3)
    with torch.no_grad():
        state = tower(pixels, output_hidden_states=True).hidden_states[-2]
        assert torch.equal(connector.extract_feature(tower, pixels).image_tokens, connector(state).image_tokens)
        photo = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
        expected = connector.extract_feature(tower, normalize(torch.from_numpy(photo)[None])).image_tokens
    embed = Embedder(folder, pooling="connector", connector=folder, device="cpu")
    assert relative_error(torch.from_numpy(embed({"image": [photo]})["features"][0]), expected) <= 1e-5
    assert "select_layer=-2" in connector.extra_repr()
    assert "select_layer" not in made.extra_repr()


def test_states_that_are_none(chat, tmp_path) -> None:
    folder = save(tmp_path, chat.state_dict(), vision_feature_layer=[-2, -1])
    with pytest.raises(ValueError, match=r"InternVLConnector: select_layer must be an integer, got \[-2, -1\]"):
        load_connector(folder)
    save(tmp_path, chat.state_dict(), select_layer=-5)
    tower, connector = InternViT.from_pretrained(folder), InternVLConnector.from_pretrained(folder)
    for call in (
        lambda: connector.extract_feature(tower, images(CONFIG, 1)),
        lambda: Embedder(folder, pooling="connector", connector=folder),
        lambda: ExportedModel(tower, connector=connector),
    ):
        with pytest.raises(ValueError, match="select_layer: expected a number from -4 to 3 of a tower with 3 blocks"):
            call()
