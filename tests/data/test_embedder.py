"""`Embedder`: the bits of the model by every door, nulls for what cannot be read, and shapes as it says."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from internvit import InternViT, InternVLConnector, optimize_for_inference
from internvit.data import Embedder
from internvit.data.pooling import POOLINGS
from internvit.data.preprocess import MAX_PATCHES, Preprocessor
from internvit.images import load_pixels
from internvit.multimodal.tiling import tile_image
from tests.support.photos import write_photos


@pytest.fixture
def photos(tmp_path, seed) -> list[Path]:
    return write_photos(tmp_path / "photos", 6, seed)


def embedder(weights, **settings) -> Embedder:
    loading = {} if isinstance(weights, InternViT) else {"device": "cpu"}
    return Embedder(weights, **{"size": (28, 42), "batch": 4, **loading, **settings})


def expected(model, paths, size) -> np.ndarray:
    with torch.inference_mode():
        return np.stack([model(load_pixels(path, size)[None]).last_hidden_state[0].float() for path in paths])


def objects(values) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values
    return column


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_form_of_an_image_gives_the_models_bits(weights, photos, dtype) -> None:
    """Also bits of an image alone: a batch of four and one of two."""
    embed = embedder(weights, dtype=dtype, pooling="tokens")
    model = optimize_for_inference(InternViT.from_pretrained(weights, dtype=getattr(torch, dtype)))
    truth = expected(model, photos, (28, 42))
    encoded = [path.read_bytes() for path in photos]
    pixels = [np.asarray(Image.open(path)) for path in photos]
    nested = [{"bytes": data, "path": None} for data in encoded[:3]] + [
        {"bytes": None, "path": str(p)} for p in photos[3:]
    ]
    columns = {
        "image": [objects(pixels), objects(nested), objects(encoded), [Image.open(path) for path in photos]],
        "bytes": [objects(encoded), [memoryview(data) for data in encoded]],
        "path": [np.array([str(path) for path in photos]), objects([str(path) for path in photos]), photos],
    }
    for name, forms in columns.items():
        for values in forms:
            batch = embed({name: values, "label": np.arange(6)})
            assert batch.keys() == {name, "label", "features", "error"}
            assert batch["features"].dtype == np.float32
            assert np.array_equal(batch["features"], truth)
            assert not any(batch["error"])


def test_a_dense_column_of_pixels_as_ray_reads_images(weights, photos) -> None:
    pixels = np.stack([np.asarray(Image.open(path).resize((60, 50))) for path in photos])
    embed = embedder(weights)
    one = np.concatenate([embed({"image": pixels[i : i + 1]})["features"] for i in range(6)])
    assert np.array_equal(embed({"image": pixels})["features"], one)
    assert embed({"image": pixels[:0]})["features"].shape == (0, 64)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("layers", [None, (0, -1)])
def test_poolings(weights, photos, tmp_path, pooling, layers) -> None:
    connector = ConnectorFile(tmp_path) if pooling == "connector" else None
    size = (28, 56)
    embed = embedder(weights, size=size, pooling=pooling, layers=layers, connector=connector and connector.folder)
    batch = embed({"path": photos})
    model = optimize_for_inference(InternViT.from_pretrained(weights))
    for number, name in enumerate(embed.columns):
        for i, path in enumerate(photos):
            with torch.inference_mode():
                output = model(load_pixels(path, size)[None], output_hidden_states=True)
                state = output.last_hidden_state if layers is None else output.hidden_states[1:][layers[number]]
                if pooling == "connector":
                    wanted = connector.module(state, (2, 4))[0]
                else:
                    wanted = {
                        "class": state[0, 0],
                        "mean": state[0, 1:].mean(0),
                        "tokens": state[0],
                        "map": state[0, 1:].T.reshape(64, 2, 4),
                    }[pooling]
            assert batch[name][i].shape == embed.shape
            torch.testing.assert_close(
                torch.from_numpy(batch[name][i]), wanted, rtol=0, atol=0 if pooling != "mean" else 1e-6
            )
    assert embed.columns == (("features",) if layers is None else ("features_0", "features_2"))


class ConnectorFile:
    """A connector, and the checkpoint of a whole InternVL that holds it."""

    def __init__(self, folder: Path) -> None:
        self.module = InternVLConnector(64, 48, ps_version="v1").eval()
        self.folder = folder / "internvl"
        self.folder.mkdir()
        (self.folder / "config.json").write_text('{"downsample_ratio": 0.5, "ps_version": "v1"}')
        tensors = {f"model.{name}": tensor for name, tensor in self.module.state_dict().items()}
        save_file({**tensors, "language_model.weight": torch.zeros(2)}, self.folder / "model.safetensors")


@pytest.mark.parametrize("arrow", [False, True])
@pytest.mark.parametrize("pooling", ["class", "tokens"])
@pytest.mark.parametrize("size", [28, "image"])
def test_what_cannot_be_read_is_null_with_its_reason(weights, photos, arrow, pooling, size) -> None:
    if arrow:
        pytest.importorskip("pyarrow", reason="arrow columns are pyarrow's")
    photos[1].write_bytes(b"no image")
    embed = embedder(weights, size=size, pooling=pooling, arrow=arrow)
    batch = embed({"path": [*photos, photos[0].with_name("none.png")]})
    whole = embed({"path": [path for i, path in enumerate(photos) if i != 1]})
    assert [error is not None for error in batch["error"]] == [i in (1, 6) for i in range(7)]
    assert "000001.png: not an image" in batch["error"][1]
    assert "none.png: no such file" in batch["error"][6]
    good = [row for i, row in enumerate(batch["features"]) if i not in (1, 6)]
    for row, wanted in zip(good, whole["features"], strict=True):
        assert np.array_equal(np.array(row.as_py() if arrow else row), np.array(wanted.as_py() if arrow else wanted))
    for i in (1, 6):
        missing = batch["features"][i]
        if arrow:
            assert missing.as_py() is None
        else:
            assert missing.shape[0] == 0 if (size, pooling) == ("image", "tokens") else np.isnan(missing).all()
    everything = embed({"path": [photos[1]]})["features"]
    assert not arrow or everything.type == batch["features"].type  # blocks of one data set agree
    with pytest.raises(ValueError, match=r"000001\.png: not an image"):
        embedder(weights, size=size, strict=True)({"path": photos})


def test_tiles_are_those_of_tile_image(weights, photos, seed) -> None:
    embed = embedder(weights, size=28, tiles=4, pooling="class", batch=3)
    batch = embed({"path": photos})
    model = optimize_for_inference(InternViT.from_pretrained(weights))
    for path, features in zip(photos, batch["features"], strict=True):
        with torch.inference_mode():
            wanted = model(tile_image(path, 28, max_tiles=4)).pooler_output
        assert np.array_equal(features, wanted)
    assert {len(row) for row in batch["features"]} == {1, 3, 5}


def test_an_image_keeps_its_size_in_whole_patches() -> None:
    preprocess = Preprocessor(14, None)
    for given, wanted in (((28, 42), (28, 42)), ((20, 50), (14, 56)), ((3, 3), (14, 14))):
        assert preprocess(np.zeros((*given, 3), np.uint8)).shape[1:3] == wanted
    for given in ((2000, 1500), (1, 100_000), (100_000, 1)):
        height, width = preprocess(np.zeros((*given, 3), np.uint8)).shape[1:3]
        assert height % 14 == width % 14 == 0
        assert 1 <= height * width // 196 <= MAX_PATCHES


def test_values_past_float16_fail_their_image(weights, photos) -> None:
    model = InternViT.from_pretrained(weights)
    with torch.no_grad():
        model.encoder.layers[-1].mlp.fc2.bias.fill_(1e6)
    batch = embedder(model, out_dtype="float16")({"path": photos[:2]})
    assert all("overflow float16" in error for error in batch["error"])
    assert not any(embedder(weights, out_dtype="float16")({"path": photos})["error"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(size=30), "size: expected .* multiples of 14"),
        (dict(size=(28, 0)), "size: expected"),
        (dict(size="big"), "size: expected"),
        (dict(size="image", tiles=4), "size: expected"),
        (dict(size=(28, 56), tiles=4), "tiles are squares"),
        (dict(pooling="max"), "pooling: expected one of class, mean"),
        (dict(dtype="int8"), "dtype: expected one of float32"),
        (dict(out_dtype="bfloat16"), "out_dtype: expected one of"),
        (dict(layers=(3,)), "from -3 to 2"),
        (dict(layers=(2, -1)), "each once"),
        (dict(batch=0), "batch, tiles: expected"),
        (dict(pooling="connector"), "connector: goes with"),
        (dict(precision="int4"), "precision must be"),
    ],
)
def test_wrong_settings_are_named(weights, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        embedder(weights, **settings)


@pytest.mark.parametrize(
    "loading", [dict(dtype="bfloat16"), dict(device="cuda"), dict(dtype="float32", device="cpu"), dict(prefix="a.")]
)
def test_a_model_is_taken_as_it_is(weights, loading) -> None:
    model = InternViT.from_pretrained(weights)
    with pytest.raises(ValueError, match=f"^{', '.join(loading)}: expected None beside an InternViT.*float32 on cpu"):
        embedder(model, **loading)
    assert embedder(model).settings()["dtype"] == "float32"
    assert embedder(model.half()).settings()["dtype"] == "float16"


def test_the_callers_connector_stays_as_it_is(weights) -> None:
    connector = InternVLConnector(64, 48).train()
    before = {name: tensor.clone() for name, tensor in connector.state_dict().items()}
    embed = embedder(weights, dtype="bfloat16", size=28, pooling="connector", connector=connector)
    assert connector.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in connector.state_dict().items())
    assert {p.dtype for p in embed.connector.parameters()} == {torch.bfloat16}
    assert not embed.connector.training


def test_wrong_batches_are_named(weights) -> None:
    with pytest.raises(ValueError, match=r"column: expected one of image, bytes, path.*has text"):
        embedder(weights)({"text": np.array(["a"])})
    with pytest.raises(ValueError, match="column: expected 'photo'"):
        embedder(weights, column="photo")({"image": []})
    batch = embedder(weights)({"image": objects([None, 3.5, np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])})
    assert all(batch["error"])
    assert "float64 [4, 4, 3]" in batch["error"][2]


def test_settings_notice_weights_and_everything_else(weights) -> None:
    first = embedder(weights).settings()
    model = InternViT.from_pretrained(weights)
    assert embedder(model).settings() == first
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc2.bias[3] += 2**-20
    assert embedder(model).settings()["weights_digest"] != first["weights_digest"]
    others = (dict(size=28), dict(pooling="mean"), dict(layers=(1,)), dict(out_dtype="float16"), dict(dtype="bfloat16"))
    for change in (*others, dict(size=28, tiles=2)):
        assert embedder(weights, **change).settings() != first
    assert embedder(weights, batch=7, strict=True, arrow=True, column="x").settings() == first


def test_it_pickles_to_a_worker(weights, photos) -> None:
    embed = embedder(weights)
    other = pickle.loads(pickle.dumps(embed))
    assert np.array_equal(other({"path": photos})["features"], embed({"path": photos})["features"])


def test_grey_and_transparent_pixels(weights) -> None:
    grey = np.arange(28 * 28, dtype=np.uint8).reshape(28, 28)
    encoded = io.BytesIO()
    Image.fromarray(grey).save(encoded, "PNG")
    batch = embedder(weights)({"image": objects([grey, np.stack([grey] * 3, -1), encoded.getvalue()])})
    assert np.array_equal(batch["features"][0], batch["features"][1])
    assert np.array_equal(batch["features"][0], batch["features"][2])
