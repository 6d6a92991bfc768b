"""InternVL's connector and dynamic tiling against transformers, PIL and OpenGVLab's formula."""

import copy
import json

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import internvit
from internvit import InternViT, InternVLConnector, best_grid, tile_image
from internvit.multimodal.connector import pixel_shuffle
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, images, random_weights
from tests.support.upstream.opengvlab import InternVLChatModel

CONFIG = CONFIGS["tiny-layer_norm"]


@pytest.fixture
def chat() -> InternVLChatModel:
    model = InternVLChatModel(CONFIG, llm_hidden_size=40).eval()
    random_weights(model)
    return model


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("shape", [(2, 4, 4, 6), (1, 8, 2, 3), (0, 2, 2, 4), (3, 32, 32, 1024)])
def test_pixel_shuffle(version, shape) -> None:
    from transformers import InternVLModel

    x = torch.randn(shape)
    expected = InternVLChatModel.pixel_shuffle(type("Self", (), {"ps_version": version}), x)
    assert torch.equal(pixel_shuffle(x, version=version), expected)
    if version == "v2":
        assert torch.equal(pixel_shuffle(x), InternVLModel.pixel_shuffle(None, x))
    quarter = torch.randn(1, 4, 8, 2)
    if version == "v2":
        assert torch.equal(pixel_shuffle(quarter, 0.25), InternVLModel.pixel_shuffle(None, quarter, 0.25))


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("select_layer", [-1, -2, 1])
def test_extract_feature_is_upstreams(chat, version, select_layer) -> None:
    chat.ps_version, chat.select_layer = version, select_layer
    tower = InternViT(CONFIG).eval()
    tower.load_state_dict(chat.vision_model.state_dict())
    connector = InternVLConnector.from_state_dict(chat.state_dict(), ps_version=version)
    pixels = images(CONFIG, 2)
    expected = chat.extract_feature(pixels)
    features = connector.extract_feature(tower, pixels, select_layer)
    assert features.shape == (2, 4, 40)
    assert relative_error(features, expected) <= 1e-5
    features.square().mean().backward()
    expected.square().mean().backward()
    for name, p in connector.named_parameters():
        assert relative_error(p.grad, chat.get_parameter(name).grad) <= 1e-5, name


def test_transformers_projector_and_its_names(chat) -> None:
    from transformers import InternVLConfig, InternVLVisionConfig
    from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector
    from transformers.models.qwen2 import Qwen2Config

    connector = InternVLConnector.from_state_dict({f"model.{k}": v for k, v in chat.state_dict().items()})
    config = InternVLConfig(vision_config=InternVLVisionConfig(hidden_size=96), text_config=Qwen2Config(hidden_size=40))
    projector = InternVLMultiModalProjector(config)
    theirs = connector.to_state_dict("transformers")
    projector.load_state_dict({k.removeprefix("multi_modal_projector."): v for k, v in theirs.items()}, strict=True)
    tokens = torch.randn(2, 17, 96)
    expected = projector(pixel_shuffle(tokens[:, 1:].view(2, 4, 4, 96)).flatten(1, 2))
    assert relative_error(connector(tokens), expected) <= 1e-5
    other = InternVLConnector(96, 40)
    other.load_state_dict(theirs)
    assert torch.equal(other(tokens), connector(tokens))
    whole = {f"model.{k}": v for k, v in theirs.items()}
    assert torch.equal(InternVLConnector.from_state_dict(whole)(tokens), connector(tokens))
    assert connector.to_state_dict().keys() == chat.mlp1.state_dict(prefix="mlp1.").keys()


def test_grids_that_are_no_square(chat) -> None:
    tower = InternViT(CONFIG).eval()
    connector = InternVLConnector(96, 40)
    features = connector.extract_feature(tower, torch.randn(2, 3, 28, 112))
    assert features.shape == (2, 4, 40)
    tokens = tower(torch.randn(1, 3, 28, 112)).last_hidden_state
    folded = pixel_shuffle(tokens[:, 1:].view(1, 2, 8, 96)).flatten(1, 2)
    assert relative_error(connector(tokens, (2, 8)), connector.mlp1(folded)) <= 1e-5
    assert relative_error(connector(tokens, (4, 4)), connector.mlp1(folded)) > 0.1


def test_a_tile_has_the_same_tokens_alone_and_in_a_batch() -> None:
    connector = InternVLConnector(1024, 896, dtype=torch.bfloat16)
    tokens = torch.randn(4, 257, 1024).bfloat16()
    with torch.no_grad():
        assert torch.equal(connector(tokens)[1:2], connector(tokens[1:2]))


def test_connector_errors() -> None:
    connector = InternVLConnector(96, 40)
    for call, message in (
        (lambda: connector(torch.randn(1, 15, 96)), "give grid where it is no square"),
        (lambda: connector(torch.randn(1, 17, 95)), r"must be \[batch, 1 \+ 4 \* 4, 96\]"),
        (lambda: connector(torch.randn(1, 10, 96)), "multiples of 2"),
        (lambda: InternVLConnector(96, 40, ps_version="v3"), "ps_version"),
        (lambda: pixel_shuffle(torch.randn(1, 2, 2, 1), 0.3), "one over an integer"),
        (lambda: pixel_shuffle(torch.randn(1, 2, 2, 1), version="v0"), "version"),
        (lambda: InternVLConnector.from_state_dict({"a.weight": torch.ones(1)}), r"found no mlp1\.0\.weight"),
        (lambda: connector.to_state_dict("timm"), "layout"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    twice = {**connector.to_state_dict(), **connector.to_state_dict("transformers")}
    with pytest.raises(ValueError, match="expected one connector"):
        InternVLConnector.from_state_dict(twice)


@given(
    height=st.integers(1, 5000),
    width=st.integers(1, 5000),
    bounds=st.sampled_from([(1, 12), (1, 40), (1, 6), (3, 12), (1, 1)]),
)
def test_best_grid_is_transformers(height, width, bounds) -> None:
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas((height, width), (448, 448), *bounds)
    assert best_grid(height, width, 448, *bounds) == (rows, columns)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("height", "width", "max_tiles", "count"),
    [(512, 512, 12, 2), (300, 1200, 12, 5), (2000, 1500, 12, 13), (4000, 3000, 40, 13), (100, 100, 12, 1)],
)
def test_tiles_are_transformers_and_nearly_pils(height, width, max_tiles, count) -> None:
    from skimage import data
    from transformers.image_utils import PILImageResampling, SizeDict
    from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

    photo = Image.fromarray(data.astronaut()).resize((width, height))
    tiles = tile_image(photo, max_tiles=max_tiles, normalize=False)
    pixels = torch.from_numpy(numpy.array(photo)).permute(2, 0, 1)
    size = SizeDict(height=448, width=448)
    theirs = GotOcr2ImageProcessor().crop_image_to_patches(
        pixels[None], 1, max_tiles, patch_size=size, resample=PILImageResampling.BICUBIC
    )[0]
    assert torch.equal(tiles, theirs)
    rows, columns = best_grid(height, width, max_tiles=max_tiles)
    assert len(tiles) == rows * columns + (rows * columns > 1)
    by_pil = numpy.array(photo.resize((448 * columns, 448 * rows), Image.Resampling.BICUBIC))
    for i in range(rows * columns):
        row, column = divmod(i, columns)
        box = by_pil[448 * row : 448 * (row + 1), 448 * column : 448 * (column + 1)]
        difference = (tiles[i].permute(1, 2, 0).int() - torch.from_numpy(box).int()).abs()
        assert difference.max() <= 2
        assert (difference > 1).float().mean() < 0.01
    assert torch.equal(tile_image(pixels, max_tiles=max_tiles, normalize=False), tiles)
    normal = tile_image(numpy.array(photo), max_tiles=max_tiles)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (tiles.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    assert relative_error(normal, expected) < 1e-6
    assert len(tile_image(photo, max_tiles=max_tiles, thumbnail=False)) == rows * columns


def test_tiles_go_through_the_tower_in_one_batch() -> None:
    model = internvit.InternViT(CONFIG).eval()
    connector = InternVLConnector(96, 40)
    tiles = tile_image(torch.randint(0, 256, (3, 100, 210), dtype=torch.uint8), image_size=56)
    assert connector.extract_feature(model, tiles).shape == (len(tiles), 4, 40)


def test_tiles_of_arrays_with_any_strides(generator) -> None:
    pixels = torch.randint(0, 256, (70, 110, 3), dtype=torch.uint8, generator=generator).numpy()
    read_only = pixels.copy()
    read_only.flags.writeable = False
    wide = numpy.repeat(pixels, 2, 1)
    for view in (pixels[::-1], pixels[:, ::-1], pixels[..., ::-1], pixels[::-2, ::3], wide[:, ::2], read_only):
        expected = tile_image(numpy.ascontiguousarray(view).copy(), image_size=28)
        assert torch.equal(tile_image(view, image_size=28), expected)
    assert torch.equal(tile_image(numpy.asfortranarray(pixels), 28), tile_image(pixels, 28))


def test_tiles_of_files(tmp_path, generator) -> None:
    pixels = torch.randint(0, 256, (40, 90, 3), dtype=torch.uint8, generator=generator).numpy()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(tile_image(path, image_size=28), tile_image(pixels, image_size=28))
    deep = pixels[..., 0].astype(numpy.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    grey = numpy.repeat(pixels[..., :1], 3, -1)
    for image in (tmp_path / "deep.png", Image.open(tmp_path / "deep.png")):
        assert torch.equal(tile_image(image, image_size=28), tile_image(grey, image_size=28))
    alpha = numpy.where(numpy.arange(90) < 45, 0, 255).astype(numpy.uint8)[None, :, None].repeat(40, 0)
    Image.fromarray(numpy.concatenate([pixels, alpha], -1)).save(tmp_path / "alpha.png")
    over_white = numpy.where(alpha > 0, pixels, 255).astype(numpy.uint8)
    for image in (tmp_path / "alpha.png", Image.open(tmp_path / "alpha.png")):
        assert torch.equal(tile_image(image, image_size=28), tile_image(over_white, image_size=28))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: not an image"):
        tile_image(tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        tile_image(tmp_path / "nowhere.png")


def test_tiling_errors() -> None:
    for call, message in (
        (lambda: best_grid(0, 5), "at least 1"),
        (lambda: best_grid(5, 5, min_tiles=3, max_tiles=2), "min_tiles <= max_tiles"),
        (lambda: tile_image(torch.rand(3, 8, 8)), "8-bit RGB"),
        (lambda: tile_image(torch.zeros(4, 8, 8, dtype=torch.uint8)), r"got shape \[4, 8, 8\]"),
        (lambda: tile_image(numpy.zeros((8, 8, 3), numpy.uint16)), "ndarray of dtype uint16"),
        (lambda: tile_image(None), "NoneType of dtype object"),
        (lambda: tile_image(numpy.zeros((8, 8), numpy.uint8)), r"got shape \[8, 8\]"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_features_of_a_float32_residual_stream_beside_float16_weights() -> None:
    connector = InternVLConnector(8, 16, dtype=torch.float16)
    features = torch.randn(1, 17, 8)
    features[..., 3] = 1e5  # past float16's end
    wide = copy.deepcopy(connector).double()
    out = connector(features)
    assert out.dtype == torch.float16
    assert relative_error(out, wide(features.double())) < 5e-3


@pytest.mark.parametrize("form", ["shards", "pickle", "file"])
def test_from_pretrained_reads_what_the_checkpoint_names(form, tmp_path) -> None:
    """Of shards those of the index, whatever an earlier checkpoint left in the folder."""
    connector = InternVLConnector(CONFIG.hidden_size, 40, ps_version="v1").eval()
    tensors = {**connector.state_dict(), "vision_model.weight": torch.zeros(2)}
    (tmp_path / "config.json").write_text('{"downsample_ratio": 0.5, "ps_version": "v1"}')
    if form == "shards":
        names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(tensors)}
        for name in set(names.values()):
            save_file({key: t for key, t in tensors.items() if names[key] == name}, tmp_path / name)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        save_file({key: t + 1 for key, t in tensors.items()}, tmp_path / "old.safetensors")
    elif form == "pickle":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "tokens.safetensors")
    loaded = InternVLConnector.from_pretrained(tmp_path / "tokens.safetensors" if form == "file" else tmp_path)
    assert loaded.ps_version == "v1"
    assert not loaded.training
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in connector.state_dict().items())


def test_from_pretrained_of_what_is_no_internvl(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        InternVLConnector.from_pretrained(tmp_path)
    save_file({"vision_model.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"expected mlp1\.\*"):
        InternVLConnector.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        InternVLConnector.from_pretrained(tmp_path)
