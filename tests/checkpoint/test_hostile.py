"""Checkpoints made by somebody who means harm, or by a broken writer: one ValueError that names the file."""

import io
import json
import logging
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from internvit.checkpoint.files import read_index
from internvit.checkpoint.load import load_pretrained
from internvit.config import InternViTConfig
from internvit.model.vit import InternViT
from internvit.names import LAYOUTS
from tests.checkpoint.models import assert_loaded
from tests.support.strategies import random_weights

TINY = InternViTConfig(
    image_size=28, patch_size=14, num_channels=1, hidden_size=64, num_hidden_layers=1, num_attention_heads=1,
    intermediate_size=8, norm_type="layer_norm", qkv_bias=True, qk_normalization=False,
)  # fmt: skip
LS1 = "encoder.layers.0.ls1"


def refused(path: Path, message: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(InternViT, path, **options)
    assert str(path) in str(error.value)


def write_safetensors(path: Path, header: str | dict, data: bytes) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def header_of(config: InternViTConfig, **types: str) -> tuple[dict, bytes]:
    """The header of a safetensors file with some tensors of other types, and its data."""
    bits = {"F4": 4, "F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "F6_E2M3": 6, "F32": 32, "C64": 64}
    header, end = {}, 0
    for name, shape in config.parameter_shapes().items():
        dtype = types.get(name.rpartition(".")[2], "F32")
        start, end = end, end + torch.Size(shape).numel() * bits[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    return header, bytes(end)


# ---- safetensors ----


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "I8", "C64"])
def test_types_that_are_no_weights(tmp_path, dtype: str) -> None:
    path = write_safetensors(tmp_path / "x.safetensors", *header_of(TINY, ls1=dtype))
    refused(path, rf"(expected {LS1} in floating point.*got|not a whole safetensors file|{LS1})")


@pytest.mark.parametrize("same_place", [True, False])
def test_a_key_twice(tmp_path, same_place: bool) -> None:
    header, data = header_of(TINY)
    text = json.dumps(header)
    place = header[LS1]["data_offsets"] if same_place else [len(data), len(data) + 256]
    twice = json.dumps({LS1: {"dtype": "F32", "shape": [64], "data_offsets": place}})[1:-1]
    path = write_safetensors(
        tmp_path / "x.safetensors", f"{text[:-1]}, {twice}}}", data + bytes(256 * (not same_place))
    )
    refused(path, rf"{LS1} twice|not a whole safetensors file")


def test_float8_needs_a_dtype(tmp_path) -> None:
    weights = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in random_weights(TINY).items()}
    save_file(weights, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "in floating point of 16 to 64 bits, got torch.float8_e4m3fn; pass dtype")
    loaded = load_pretrained(InternViT, tmp_path / "x.safetensors", dtype=torch.bfloat16)
    assert_loaded(loaded, {name: tensor.bfloat16() for name, tensor in weights.items()})
    with pytest.raises(ValueError, match="dtype: expected a floating-point"):
        load_pretrained(InternViT, tmp_path / "x.safetensors", dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "weight.absmax"])
@pytest.mark.parametrize("strict", [True, False])
def test_quantised_weights_with_scales(tmp_path, scale: str, strict: bool) -> None:
    weights = random_weights(TINY) | {f"encoder.layers.0.mlp.fc1.{scale}": torch.ones(1)}
    save_file(weights, tmp_path / "x.safetensors")
    expected = "quantised ones with their scales: |a quantization_config in config.json that explains "
    refused(tmp_path / "x.safetensors", f"({expected}).*{scale}", strict=strict)


# ---- torch.save ----


def saved_pth(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def cycle() -> dict:
    outer: dict = {}
    outer["model"] = outer
    return outer


PICKLES = {
    "a list": lambda w: list(w.values()),
    "a number": lambda w: 7,
    "a cycle": lambda w: cycle(),
    "sparse": lambda w: {**w, LS1: torch.ones(64).to_sparse()},
    "CSR": lambda w: {**w, "encoder.layers.0.mlp.fc1.weight": torch.ones(8, 64).to_sparse_csr()},
    "meta": lambda w: {**w, LS1: torch.ones(64, device="meta")},
    "quantised": lambda w: {**w, LS1: torch.quantize_per_tensor(torch.ones(64), 0.1, 0, torch.qint8)},
    "expanded": lambda w: {**w, "encoder.layers.0.mlp.fc1.weight": torch.ones(1).expand(10**6, 64)},
    "numbers for keys": lambda w: {**w, 7: torch.ones(1)},
    "nested in lists": lambda w: {"model": [w]},
    "empty": lambda w: {},
    "one parameter": lambda w: {LS1: w[LS1]},
    "a scalar": lambda w: {**w, LS1: torch.tensor(1.0)},
    "a scalar for qkv": lambda w: {**w, "encoder.layers.0.attn.qkv.weight": torch.tensor(1.0)},
    "complex": lambda w: {**w, LS1: torch.ones(64, dtype=torch.complex64)},
}


@pytest.mark.filterwarnings("ignore")  # of the sparse tensors and the quantised ones
@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("with_config", [True, False])
def test_pickles(tmp_path, name: str, with_config: bool) -> None:
    path = saved_pth(tmp_path / "x.pth", PICKLES[name](random_weights(TINY)))
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    refused(path, ".")


@pytest.mark.filterwarnings("ignore")
def test_other_parts_of_a_model_may_be_anything(tmp_path) -> None:
    """Only the tower's tensors have to be dense."""
    weights = {f"vision_model.{key}": value for key, value in random_weights(TINY).items()}
    others = {"language_model.a": torch.ones(64).to_sparse(), "language_model.b": torch.ones(64, device="meta")}
    others["language_model.c"] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    path = saved_pth(tmp_path / "x.pth", {**others, **weights})
    assert_loaded(load_pretrained(InternViT, path), random_weights(TINY))


def test_a_record_shorter_than_its_tensor(tmp_path) -> None:
    """torch reads on into the next record."""
    whole = saved_pth(tmp_path / "whole.pth", random_weights(TINY))
    for cut in (4, 64, 128):
        path = tmp_path / f"{cut}.pth"
        with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                data = source.read(entry)
                target.writestr(entry.filename, data[:-cut] if entry.filename.endswith("data/9") else data)
        refused(path, r"not a whole file of torch\.save: (expected \d+ bytes in data/9, got|RuntimeError)")
    assert_loaded(load_pretrained(InternViT, whole), random_weights(TINY))


def test_records_of_every_type_are_measured(tmp_path) -> None:
    """What is whole loads, views of one storage and all types of weights."""
    flat = torch.randn(100)
    others = {"epoch.x": torch.ones(3, dtype=torch.int64), "mask.y": torch.ones(5, dtype=torch.bool)}
    others |= {"z.a": flat[:50], "z.b": flat[25:], "z.c": torch.ones(3, dtype=torch.complex64), "z.e": torch.ones(0)}
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float32):
        weights = {f"vit.{k}": v.to(dtype) for k, v in random_weights(TINY).items()}
        path = saved_pth(tmp_path / "x.pth", {**weights, **others})
        assert_loaded(load_pretrained(InternViT, path), {k.removeprefix("vit."): v for k, v in weights.items()})


# ---- config.json and the index ----


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "7", '"x"', "[" * 10_000, '{"a":' * 10_000,
        '{"vision_config": []}', '{"vision_config": "x"}', '{"vision_config": {"vision_config": 1}}',
        '{"initializer_factor": 1' + "0" * 5000 + "}",
        '{"model_type": "internvl_chat"}', '{"model_type": "internvl", "hidden_size": 64}', '{"model_type": []}',
        '{"model_type": "internvl_chat", "llm_config": {"hidden_size": 896}}', '{"vision_config": 7}',
        '{"architecture": []}', '{"architecture": {}}',
        '{"architecture": "vit_intern300m_patch14_448", "model_args": [1]}',
        '{"hidden_size": 1e999}', '{"hidden_size": [64]}', '{"hidden_size": {}}', '{"num_hidden_layers": 1.5}',
        '{"hidden_size": -1}', '{"patch_size": [[1], [2]]}', '{"patch_size": [{}]}', '{"patch_size": {}}',
        '{"image_size": {"height": 28}}', '{"image_size": [[28], 28]}', '{"image_size": NaN}', "\ud800", "\x00",
        '{"layer_norm_eps": 1' + "0" * 400 + "}", '{"norm_type": []}', '{"layer_norm_eps": NaN}',
        '{"embed_dim": "x"}', '{"embed_dim": 64, "mlp_ratio": "4"}', '{"embed_dim": 64, "mlp_ratio": 1e308}',
        '{"embed_dim": 64, "mlp_ratio": -4}', '{"embed_dim": null, "mlp_ratio": []}', '{"qkv_bias": 1}',
        '{"num_hidden_layers": 1' + "0" * 300 + "}", '{"embed_dim": 1' + "0" * 400 + "}",
    ],
)  # fmt: skip
def test_configurations(tmp_path, text: str) -> None:
    save_file(random_weights(TINY), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"."):
        load_pretrained(InternViT, tmp_path)
    with pytest.raises(ValueError, match=r".") as error:
        load_pretrained(InternViT, tmp_path)
    assert str(tmp_path) in str(error.value)


def test_values_of_a_configuration_name_the_file(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**TINY.to_dict(), "hidden_size": 65, "num_attention_heads": 2}))
    with pytest.raises(ValueError, match="hidden_size must be a multiple of num_attention_heads=2, got 65") as error:
        InternViTConfig.from_json(path)
    assert str(path) in str(error.value)


def test_whole_numbers_are_floats(tmp_path) -> None:
    whole = {
        "initializer_factor": 1,
        "drop_path_rate": 0,
        "layer_norm_eps": 1,
        "initializer_range": 0,
        "qk_norm_eps": 1,
    }
    config = InternViTConfig.from_dict({**TINY.to_dict(), **whole})
    assert all(isinstance(getattr(config, name), float) for name in whole)
    model = InternViT(config)
    assert model.encoder.layers[0].ls1.dtype == torch.float32


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "intermediate_size", "image_size"])
def test_a_huge_configuration_beside_a_small_file(tmp_path, field: str) -> None:
    save_file(random_weights(TINY), tmp_path / "model.safetensors")
    huge = {"image_size": 14 * 10**9, "hidden_size": 10**12}.get(field, 10**9)
    (tmp_path / "config.json").write_text(json.dumps({**TINY.to_dict(), field: huge}))
    for strict in (True, False):
        refused(tmp_path, "the weights do not fit the configuration", strict=strict)


@pytest.mark.skipif(os.name == "nt", reason="FIFOs of POSIX")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json", "x.pth"])
def test_a_fifo(tmp_path, name: str) -> None:
    if name == "config.json":
        save_file(random_weights(TINY), tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / name)
    refused(tmp_path, "expected a regular file")
    refused(tmp_path / name, "expected a regular file") if name != "config.json" else None


@pytest.mark.parametrize(
    "value", ["[]", "null", '"x"', "7", '{"a": 1}', '{"a": null}', '{"a": ["x"]}', '{"a": "*"}', '{"a": "model-?.bin"}',
              '{"a": ".."}', '{"a": "."}', '{"a": ""}', '{"a": "a/b"}', '{"a": "a\\\\b"}', '{"a": "[ab].bin"}',
              '{"a": "C:x"}', '{"a": "x\\u0000"}']
)  # fmt: skip
def test_indexes(tmp_path, value: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(f'{{"weight_map": {value}}}')
    with pytest.raises(ValueError, match="not an index of shards|expected file names of its own folder") as error:  # noqa: RUF043
        read_index(path)
    assert str(path) in str(error.value)
    refused(tmp_path, "index")


# ---- values ----


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), None, "encoder.layers.0.ls1 holds NaN (1 of 18 tensors are not finite)"),
        (float("-inf"), None, "encoder.layers.0.ls1 holds infinity (1 of 18"),
        (-7e4, torch.float16, "encoder.layers.0.ls1 holds 70000, which overflows torch.float16 (1 of 18"),
        (3.4e38, torch.bfloat16, "encoder.layers.0.ls1 holds 3.4e+38, which overflows torch.bfloat16 (1 of 18"),
        (6e4, torch.float16, None),
        (1e38, None, None),
    ],
)
def test_values_that_are_not_finite_are_named_once(tmp_path, caplog, value: float, dtype, message: str | None) -> None:
    weights = random_weights(TINY)
    weights[LS1][5] = value
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    with caplog.at_level(logging.WARNING, "internvit"):
        load_pretrained(InternViT, tmp_path, dtype=dtype)
    assert len(caplog.records) == (message is not None)
    assert message is None or message in caplog.text


# ---- fuzz ----

FORMS = {
    "x.safetensors": save(random_weights(TINY)),
    "x.pth": (lambda file: (torch.save(random_weights(TINY), file), file.getvalue())[1])(io.BytesIO()),
    "old.pth": (lambda file: (
        torch.save(random_weights(TINY), file, _use_new_zipfile_serialization=False), file.getvalue())[1]
    )(io.BytesIO()),
    "plain.bin": pickle.dumps({"a": [1, 2], "cls_token": None}),
    "config.json": json.dumps(TINY.to_dict()).encode(),
    "timm/config.json": json.dumps(TINY.to_dict("timm")).encode(),
    "model.safetensors.index.json": json.dumps(
        {"weight_map": dict.fromkeys(TINY.parameter_shapes(), "x.safetensors")}
    ).encode(),
}  # fmt: skip
FUZZ = settings(
    max_examples=200, deadline=None, derandomize=False, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def load_or_refuse(path: Path) -> None:
    """A whole model, or an error of those that are documented, which names the file."""
    message = str(path)
    try:
        load_pretrained(InternViT, path)
    except (ValueError, FileNotFoundError) as error:
        message = str(error)
    assert str(path.parent) in message


def place(folder: Path, name: str, data: bytes) -> Path:
    for old in folder.iterdir():
        old.unlink()
    path = folder / Path(name).name
    if path.suffix == ".json":
        (folder / ("x.safetensors" if "index" in name else "model.safetensors")).write_bytes(FORMS["x.safetensors"])
    path.write_bytes(data)
    return path


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(st.sampled_from(sorted(FORMS)), st.binary(max_size=300))
def test_random_bytes(tmp_path, name: str, data: bytes) -> None:
    load_or_refuse(place(tmp_path, name, data))


@pytest.mark.sampled(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(FORMS))
@FUZZ
@given(st.data())
def test_mutated_files(tmp_path, name: str, data: st.DataObject) -> None:
    """Bytes changed, taken out or doubled, mostly where the structure is: at the start and the end."""
    content = bytearray(FORMS[name])
    size = len(content)
    near = st.one_of(st.integers(0, min(2000, size - 1)), st.integers(max(0, size - 4000), size - 1))
    for _ in range(data.draw(st.integers(1, 4))):
        at = min(data.draw(near), len(content) - 1)
        kind = data.draw(st.sampled_from(["set", "cut", "double", "insert"]))
        span = data.draw(st.integers(1, 16))
        if kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut" and len(content) > span + 1:
            del content[at : at + span]
        elif kind == "double":
            content[at:at] = content[at : at + span]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    load_or_refuse(place(tmp_path, name, bytes(content)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("x" * 300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = [
    *TINY.to_dict(),
    *("vision_config", "internvit", "architecture", "model_args", "embed_dim", "depth", "mlp_ratio", "type"),
    *("attention_bias", "use_mean_pooling", "layer_scale_init_value"),
]


@FUZZ
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.sampled_from(LAYOUTS))
def test_mutated_configurations(changes: dict, spelling: str) -> None:
    config = message = None
    try:
        config = InternViTConfig.from_dict({**TINY.to_dict(spelling), **changes})
    except ValueError as error:
        message = str(error)
    assert "InternViTConfig" in message if message else InternViTConfig.from_dict(config.to_dict()) == config
