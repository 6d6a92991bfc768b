"""A broken checkpoint is a clear error."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvit.checkpoint.load import load_pretrained
from internvit.model.vit import InternViT
from tests.checkpoint.models import PLAIN, assert_loaded
from tests.support.strategies import random_weights


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
