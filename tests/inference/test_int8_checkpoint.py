"""int8 checkpoints: the same bits after saving and loading, compressed-tensors' convention, broken ones refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import internvit
from internvit.checkpoint.quantized import FORMAT
from internvit.inference import linear_int8
from internvit.inference.int8_grid import dequantize_weight, is_on_grid, quantize_weight
from internvit.ops import per_token_quant
from tests.inference.test_optimize import VARIANTS, small_model

SKIP = ["encoder.layers.0", "*.attn.proj"]


def saved(
    folder: Path, variant: str = VARIANTS[0], **settings: object
) -> internvit.inference.optimize.OptimizedInternViT:
    fast = internvit.optimize_for_inference(small_model(variant, torch.bfloat16, 0), precision="int8", skip=SKIP)
    fast.save_pretrained(folder, **settings)
    return fast


@pytest.mark.parametrize("layout", ["opengvlab", "transformers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_after_saving_and_loading(variant: str, layout: str, tmp_path) -> None:
    fast = saved(tmp_path, variant, layout=layout, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = internvit.InternViT.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    again = internvit.optimize_for_inference(model, precision="int8")
    assert again.int8 == fast.int8, "not the Linears that were saved in int8"
    for name in fast.int8:
        linears = [m.get_submodule(name) for m in (fast.model, model)]
        for ours, theirs in zip(*(quantize_weight(linear.weight) for linear in linears), strict=True):
            assert torch.equal(ours, theirs), name
    pixels = torch.randn(2, 3, 112, 112).bfloat16()
    if linear_int8.unavailable_reason() is None:  # elsewhere `fast` computes with weights that are not on int8's grid
        assert torch.equal(again(pixels).last_hidden_state, fast(pixels).last_hidden_state)
    wide = internvit.InternViT.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(wide.state_dict()[k].bfloat16(), v) for k, v in model.state_dict().items())
    again.save_pretrained(tmp_path, layout=layout, overwrite=True)
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["model.safetensors"], "stale shards stay"
    once_more = internvit.InternViT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(once_more[k], v) for k, v in model.state_dict().items())


def test_what_is_written_is_compressed_tensors_convention(tmp_path) -> None:
    fast = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    fields = json.loads((tmp_path / "config.json").read_text())
    entry = fields["quantization_config"]
    assert (entry["quant_method"], entry["format"], fields["torch_dtype"]) == ("compressed-tensors", FORMAT, "bfloat16")
    linears = {k.removesuffix(".weight") for k in tensors if k.endswith((".qkv.weight", ".fc1.weight", ".fc2.weight"))}
    assert {k.removesuffix(".weight_scale") for k in tensors if k.endswith("_scale")} == fast.int8
    assert set(entry["ignore"]) >= linears - fast.int8
    assert not set(entry["ignore"]) & fast.int8
    for name in fast.int8:
        weight, scale = tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"]
        assert (weight.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (len(weight), 1))
        source = fast.model.get_submodule(name).weight
        assert ((weight * scale - source.float()).abs() <= scale / 2 * 1.0001).all()


def test_compressed_tensors_reads_it(tmp_path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    saved(tmp_path)
    model = internvit.InternViT.from_pretrained(tmp_path, dtype=torch.float32)
    config = QuantizationConfig.model_validate(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    scheme = config.config_groups["group_0"]
    assert scheme.weights.num_bits == 8
    assert scheme.input_activations.dynamic
    tensors = load_file(tmp_path / "model.safetensors")
    for key in (k for k in tensors if k.endswith("_scale")):
        name = key.removesuffix("_scale")
        theirs = dequantize(tensors[name], tensors[key], args=scheme.weights)
        assert torch.equal(theirs, model.state_dict()[name])


def test_a_weight_that_changes_is_no_longer_taken_for_int8(tmp_path) -> None:
    saved(tmp_path)
    model = internvit.InternViT.from_pretrained(tmp_path)
    model.encoder.layers[1].mlp.fc1.weight.data[0, 0] += 0.3
    fast = internvit.optimize_for_inference(model, precision="int8")
    assert "encoder.layers.1.mlp.fc1" not in fast.int8
    assert "encoder.layers.1.mlp.fc2" in fast.int8


def test_weights_on_an_int8_grid_are_recognised(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((48, 64), generator=generator).bfloat16()
    assert not is_on_grid(weight)
    weight_q, scale, _ = per_token_quant(weight)
    for dtype in (torch.bfloat16, torch.float32):
        rounded = dequantize_weight(weight_q, scale, dtype)
        assert is_on_grid(rounded)
        assert all(map(torch.equal, quantize_weight(rounded), (weight_q, scale)))
    rounded[3, 5] += 0.4 * scale[3]
    assert not is_on_grid(rounded)
    for trivial in (
        torch.zeros(8, 8),
        torch.ones(8, 8),
        torch.empty(0, 8),
        torch.ones(3),
        torch.full((8, 8), torch.nan),
    ):
        assert not is_on_grid(trivial)


def _edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NAME = "encoder.layers.1.mlp.fc1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scale"), rf"expected {NAME} in floating point.* got torch.int8"),
        (lambda t: t.update({NAME: t[NAME].bfloat16()}), rf"expected {NAME} in int8, as it has a scale, got torch.bf"),
        (lambda t: t[f"{NAME}_scale"].fill_(torch.nan), r"expected .*weight_scale to hold finite numbers from 0 on"),
        (lambda t: t.update({f"{NAME}_scale": t[f"{NAME}_scale"][:-1].clone()}), r"floating point of shape \[\d+, 1\]"),
        (lambda t: t.update({f"{NAME}_scale": t[f"{NAME}_scale"].int()}), "floating point of shape"),
        (
            lambda t: t.update({"embeddings.patch_embedding.weight_scale": torch.ones(3)}),
            "patch_embedding.weight in int8",
        ),
        (lambda t: t.update({f"{NAME}_zero_point": torch.ones(3)}), "got quantised ones with their scales"),
    ],
)
def test_wrong_and_half_files_are_refused(change, message: str, tmp_path) -> None:
    saved(tmp_path)
    _edit(tmp_path / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        internvit.InternViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: f.pop("quantization_config"),
            "expected a quantization_config in config.json that explains the scales .* got none",
        ),
        (lambda f: f["quantization_config"].update(format="pack-quantized"), "'int-quantized', got 'pack-quantized'"),
        (
            lambda f: f["quantization_config"]["config_groups"]["group_0"]["weights"].update(strategy="group"),
            "a scale for each channel, got .*'group'",
        ),
    ],
)
def test_a_config_that_means_something_else_is_refused(change, message: str, tmp_path) -> None:
    saved(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    change(fields)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        internvit.InternViT.from_pretrained(tmp_path)


def test_nothing_is_overwritten_and_weights_that_are_not_finite_are_refused(tmp_path) -> None:
    fast = saved(tmp_path)
    with pytest.raises(FileExistsError, match="holds weights"):
        fast.save_pretrained(tmp_path)
    fast.model.encoder.layers[1].mlp.fc2.weight.data[0, 0] = torch.nan
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"expected finite weights, got others in encoder.layers.1.mlp.fc2.weight"):
        fast.save_pretrained(tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() == before
