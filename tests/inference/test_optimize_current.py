"""An optimised model computes with the model as it is: changed weights, hooks and modules that come later."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import internvit
from internvit.inference.linear import packed_linear_class
from internvit.inference.packed_block import PackedBlock
from internvit.numerics import relative_error
from internvit.output import InternViTOutput
from tests.inference.test_optimize import VARIANTS, small_model
from tests.support.hooks import KINDS, count_calls

DTYPES = [torch.float32, torch.bfloat16]
packs = pytest.mark.skipif(
    packed_linear_class(torch.zeros(8, 8, dtype=torch.bfloat16)) is None, reason="this CPU packs no bfloat16 Linear"
)


def optimized(dtype: torch.dtype = torch.bfloat16) -> tuple[internvit.InternViT, nn.Module, Tensor]:
    model = small_model(VARIANTS[0], dtype, 0)
    return model, internvit.optimize_for_inference(model), torch.randn(2, 3, 112, 112).to(dtype)


def check(model: internvit.InternViT, fast: nn.Module, pixels: Tensor) -> None:
    """`fast` has the features of `model`; another rounding of folded weights apart."""
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    assert relative_error(fast(pixels).last_hidden_state, expected) < (1e-6 if pixels.dtype == torch.float32 else 0.02)


def one_element(model: internvit.InternViT) -> None:
    model.encoder.layers[1].mlp.fc1.weight.data[3, 7] = 40.0


def one_bias(model: internvit.InternViT) -> None:
    model.encoder.layers[2].attn.qkv.bias.data[-1] = 40.0


def swapped_rows(model: internvit.InternViT) -> None:
    weight = model.encoder.layers[0].mlp.fc2.weight
    weight.data.copy_(weight.data.flip(0).clone())


def exponential_average(model: internvit.InternViT) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(0.9).add_(torch.randn_like(parameter), alpha=0.1)


def layer_scale(model: internvit.InternViT) -> None:
    model.encoder.layers[1].ls2.data.mul_(-2)


def low_rank_merge(model: internvit.InternViT) -> None:
    weight = model.encoder.layers[0].attn.proj.weight
    weight.data += (torch.randn(256, 2) @ torch.randn(2, 256)).to(weight.dtype) / 8


def fused_optimizer(model: internvit.InternViT) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def load(model: internvit.InternViT) -> None:
    model.load_state_dict({k: v * 1.3 for k, v in model.state_dict().items()})


def assign(model: internvit.InternViT) -> None:
    model.load_state_dict({k: v * 1.3 for k, v in model.state_dict().items()}, assign=True)


def numpy_alias(model: internvit.InternViT) -> None:
    model.encoder.layers[0].attn.qkv.weight.detach().view(torch.int16).numpy()[5:9] = 0


CHANGES = [
    *(one_element, one_bias, swapped_rows, exponential_average, layer_scale, low_rank_merge, fused_optimizer),
    *(load, assign, numpy_alias),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_changed_by_any_way(change, dtype) -> None:
    model, fast, pixels = optimized(dtype)
    before = fast(pixels).last_hidden_state
    change(model)
    check(model, fast, pixels)
    assert relative_error(fast(pixels).last_hidden_state, before) > 1e-3, "the change matters"


@packs
def test_only_what_has_changed_is_packed_again(monkeypatch) -> None:
    model, fast, pixels = optimized()
    packed, make = [], PackedBlock.__init__
    monkeypatch.setattr(
        PackedBlock, "__init__", lambda self, layer, int8, fold: packed.append(layer) or make(self, layer, int8, fold)
    )
    fast(pixels)
    assert not packed
    model.encoder.layers[1].mlp.fc1.weight.data[0, 0] += 1
    fast(pixels)
    fast(pixels)
    assert packed == [model.encoder.layers[1]]


def test_inference_tensors_edited_in_place() -> None:
    """They count no versions."""
    with torch.inference_mode():
        model, fast, pixels = optimized()
        fast(pixels)
        model.encoder.layers[0].mlp.fc1.weight.mul_(1.7)
        check(model, fast, pixels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_make_fx_records_the_models_forward(dtype) -> None:
    """Packed weights are compared with the model's at each call, which no graph can do."""
    model, fast, pixels = optimized(dtype)
    fast(pixels)
    graph = make_fx(lambda x: fast(x).last_hidden_state)(pixels)
    check(model, lambda x: InternViTOutput(graph(x), x), pixels)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_around_it(dtype, autocast) -> None:
    """Packed weights are of the model's dtype: in float16, its own forward runs."""
    model, fast, pixels = optimized(dtype)
    with torch.autocast("cpu", autocast):
        check(model, fast, pixels)
        with torch.no_grad():
            assert fast(pixels).last_hidden_state.dtype == model(pixels).last_hidden_state.dtype
    check(model, fast, pixels)


@pytest.mark.parametrize("name", ["", "encoder", "embeddings", "encoder.layers.1", "encoder.layers.0.mlp.fc1"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hooks_and_forwards_that_come_later(name, kind, dtype) -> None:
    model, fast, pixels = optimized(dtype)
    fast(pixels)
    module = model.get_submodule(name)
    calls = count_calls(module, kind)
    fast(pixels)
    assert calls == [1]
    check(model, fast, pixels)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modules_replaced_moved_and_cast_later(dtype) -> None:
    model, fast, pixels = optimized(dtype)
    layers = model.encoder.layers
    layers[0].mlp.fc2 = nn.Linear(512, 256, dtype=dtype)
    check(model, fast, pixels)
    layers[1].attn.qkv = nn.Sequential(layers[1].attn.qkv)
    check(model, fast, pixels)
    del layers[2]
    check(model, fast, pixels)
    model.float()
    check(model, fast, pixels.float())
    model.bfloat16()
    check(model, fast, pixels.bfloat16())
    model.set_rounding("reference")
    model.residual_dtype = torch.float32
    assert fast(pixels).last_hidden_state.dtype == torch.float32
    check(model, fast, pixels.bfloat16())


def test_training_mode_drops_paths() -> None:
    model, fast, pixels = optimized()
    for layer in model.encoder.layers:
        layer.drop_path_rate = 0.9
    expected = fast(pixels).last_hidden_state
    fast.train()
    torch.manual_seed(0)
    assert not torch.equal(fast(pixels).last_hidden_state, expected)
    assert torch.equal(fast.eval()(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_and_pickles(dtype) -> None:
    model, fast, pixels = optimized(dtype)
    expected = fast(pixels).last_hidden_state
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(fast),
        pickle.loads(pickle.dumps(fast)),
        torch.load(buffer, weights_only=False),
    ):
        assert repr(other) == repr(fast)
        assert torch.equal(other(pixels).last_hidden_state, expected)
        assert other.model is not model
        other.model.encoder.layers[0].mlp.fc1.weight.data.mul_(2)
        check(other.model, other, pixels)
        assert torch.equal(fast(pixels).last_hidden_state, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_a_models_stand_in(dtype) -> None:
    model, fast, pixels = optimized(dtype)
    assert fast.config is model.config
    assert fast.dtype == dtype
    assert fast.device == model.device
    weights = {k: v * 1.2 for k, v in fast.state_dict().items()}
    assert str(fast.load_state_dict(weights)) == "<All keys matched successfully>"
    check(model, fast, pixels)
    del weights["encoder.layers.0.ls1"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "encoder\.layers\.0\.ls1"'):
        fast.load_state_dict(weights)
    assert fast.load_state_dict(weights, strict=False).missing_keys == ["encoder.layers.0.ls1"]
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


@packs
def test_eight_threads_find_changed_weights() -> None:
    """All of them at once, so that several pack the same layer again."""
    model, fast, pixels = optimized()
    for factor in (1.05, 0.9):
        model.load_state_dict({k: v * factor for k, v in model.state_dict().items()})
        results: list[Tensor] = []

        def run(results: list[Tensor] = results) -> None:
            results.append(fast(pixels).last_hidden_state)

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = internvit.optimize_for_inference(model)(pixels).last_hidden_state
        assert len(results) == 8
        assert all(torch.equal(result, expected) for result in results)


def test_modules_around_it_load_what_they_save() -> None:
    """Keys are the model's: a parent found none of them, and with strict=False loaded nothing."""
    config = internvit.InternViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=56
    )

    def classifier() -> nn.Module:
        tower = internvit.optimize_for_inference(internvit.InternViT(config, dtype=torch.bfloat16).eval())
        return nn.ModuleDict({"tower": tower, "head": nn.Linear(64, 2)})

    saved, other, third = classifier(), classifier(), classifier()
    state = saved.state_dict()
    assert "tower.embeddings.class_embedding" in state
    other.load_state_dict(state)
    third.load_state_dict({name: tensor for name, tensor in state.items() if "head" not in name}, strict=False)
    named = dict(saved.named_parameters())
    classifier().load_state_dict(named)
    pixels = torch.randn(1, 3, 56, 56).bfloat16()
    expected = saved["tower"](pixels).last_hidden_state
    for loaded in (other, third):
        assert torch.equal(loaded["tower"](pixels).last_hidden_state, expected)
    del state["tower.encoder.layers.1.ls1"]
    with pytest.raises(RuntimeError, match=r"Missing key.*encoder\.layers\.1\.ls1"):
        other.load_state_dict(state)
    called = torch.func.functional_call(other["tower"], saved["tower"].state_dict(), (pixels,))
    assert torch.equal(called.last_hidden_state, expected)
