"""Linears that torchao has quantised: the fused passes around them stay, and int8 ones feed the int8 GEMM."""

import copy

import pytest
import torch

import internvit
from internvit.inference import linear_int8, optimize
from internvit.inference.block_run import BlockRun
from internvit.inference.torchao_int8 import int8_values
from internvit.model.block import is_unmodified
from internvit.numerics import relative_error
from tests.inference.test_optimize import VARIANTS, small_model, truth_of

quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
multiplies = pytest.mark.skipif(
    linear_int8.unavailable_reason() is not None, reason=str(linear_int8.unavailable_reason())
)
CONFIGS = {  # Float8DynamicActivationFloat8WeightConfig refuses to be made without a GPU; weights alone stand for it
    "int8": quantization.Int8DynamicActivationInt8WeightConfig,
    "float8 weights": quantization.Float8WeightOnlyConfig,
    "int8 weights": quantization.Int8WeightOnlyConfig,
}


def quantised(model: internvit.InternViT, kind: str, where: str = "") -> internvit.InternViT:
    model = copy.deepcopy(model)
    linears = lambda module, name: type(module) is torch.nn.Linear and where in name  # noqa: E731
    quantization.quantize_(model, CONFIGS[kind](), filter_fn=linears)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_features_are_as_exact_as_torchaos(variant: str, kind: str, monkeypatch) -> None:
    model = small_model(variant, torch.bfloat16, 0)
    pixels = torch.randn(2, 3, 112, 112).bfloat16()
    truth = truth_of(model, pixels)
    theirs = quantised(model, kind)
    assert not is_unmodified(theirs.encoder.layers[0])
    with torch.no_grad():
        expected = relative_error(theirs(pixels).last_hidden_state, truth)
    called, call = [], BlockRun.call
    monkeypatch.setattr(BlockRun, "call", lambda self, x: called.append(self) or call(self, x))
    fast = internvit.optimize_for_inference(theirs, out_dtype=torch.float32)
    error = relative_error(fast(pixels, output_hidden_states=True).last_hidden_state, truth)
    assert not called, "a whole layer fell back"
    assert 1e-3 < error <= 1.1 * expected


@multiplies
@pytest.mark.parametrize("where", ["", "layers.1", "mlp.fc2"])
def test_int8_ones_feed_the_int8_gemm(where: str, monkeypatch) -> None:
    model = small_model(VARIANTS[0], torch.bfloat16, 0)
    theirs = quantised(model, "int8", where)
    fast, pixels = internvit.optimize_for_inference(theirs), torch.randn(1, 3, 112, 112).bfloat16()
    count = {"": 12, "layers.1": 4, "mlp.fc2": 3}[where]
    assert f"3 of 3 layers packed, {count} Linears in int8" in repr(fast)
    same = internvit.optimize_for_inference(quantised(model, "int8", where), precision="int8", skip=["encoder"])
    assert torch.equal(same(pixels).last_hidden_state, fast(pixels).last_hidden_state)
    before = fast(pixels).last_hidden_state
    layer = theirs.encoder.layers[1]
    layer.mlp.fc2.weight.qdata.neg_()
    changed = fast(pixels).last_hidden_state
    assert relative_error(changed, before) > 0.01, "new int8 values were not noticed"
    expected = internvit.optimize_for_inference(theirs)(pixels).last_hidden_state
    assert torch.equal(changed, expected)


@multiplies
def test_the_values_are_torchaos() -> None:
    linear = torch.nn.Linear(256, 96).bfloat16()
    holder = torch.nn.Sequential(linear)
    quantization.quantize_(holder, CONFIGS["int8"]())
    values = int8_values(linear.weight)
    assert values is not None
    weight = values[0].double() * values[1].double().unsqueeze(1)
    x = torch.randn(40, 256).bfloat16()
    x_q, scale, zero = internvit.ops.per_token_quant(x, symmetric=False)
    rows = (x_q.double() - zero.unsqueeze(1)) * scale.double().unsqueeze(1)
    exact = torch.nn.functional.linear(x.double(), weight, linear.bias.double())
    emulated = torch.nn.functional.linear(rows, weight, linear.bias.double()).bfloat16()
    y = linear_int8.Int8Linear(linear.weight, linear.bias.detach())(x)
    assert relative_error(y, exact) <= 1.1 * relative_error(emulated, exact)


def test_other_tensors_hold_no_int8_values() -> None:
    assert int8_values(torch.nn.Parameter(torch.randn(4, 4))) is None
    for kind in ("float8 weights", "int8 weights"):
        holder = torch.nn.Sequential(torch.nn.Linear(64, 48).bfloat16())
        quantization.quantize_(holder, CONFIGS[kind]())
        assert int8_values(holder[0].weight) is None, "its inputs are not int8"


def test_layers_with_hooks_are_called_as_before() -> None:
    theirs, seen = quantised(small_model(VARIANTS[0], torch.bfloat16, 0), "int8"), []
    theirs.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    fast = internvit.optimize_for_inference(theirs)
    fast(torch.randn(1, 3, 112, 112).bfloat16())
    assert seen == [1]
    assert optimize.is_unmodified(theirs.encoder.layers[0], quantised=True)
    assert not optimize.is_unmodified(theirs.encoder.layers[1], quantised=True)
