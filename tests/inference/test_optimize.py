"""`optimize_for_inference`: the same features, the same state_dict, the model untouched."""

import copy

import pytest
import torch
from torch import nn

import internvit
from internvit.inference.linear import fold_layer_scale, packed_linear_class
from internvit.numerics import relative_error

packs = pytest.mark.skipif(
    packed_linear_class(torch.zeros(8, 8, dtype=torch.bfloat16)) is None, reason="this CPU packs no bfloat16 Linear"
)
VARIANTS = ("internvit-300m-448px", "internvit-6b-448px-v2.5")


def small_model(variant: str, dtype: torch.dtype, seed: int) -> internvit.InternViT:
    config = internvit.InternViTConfig.from_name(variant).replace(
        num_hidden_layers=3, hidden_size=256, intermediate_size=512, num_attention_heads=4, image_size=112, name=None
    )
    torch.manual_seed(seed)
    model = internvit.InternViT(config, dtype=dtype).eval()
    for layer in model.encoder.layers:
        for parameter in (layer.ls1, layer.ls2, layer.norm1.weight, layer.norm2.weight):
            parameter.data.copy_(1 + 0.3 * torch.randn(256))
    return model


def truth_of(model: internvit.InternViT, pixels: torch.Tensor) -> torch.Tensor:
    truth = internvit.reference.InternViT(model.config).double().eval()
    truth.load_state_dict(model.state_dict())
    with torch.no_grad():
        return truth(pixels.double()).last_hidden_state


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_features_are_as_exact_as_the_models(variant: str, dtype: torch.dtype, pack: bool, seed: int) -> None:
    model = small_model(variant, dtype, seed)
    pixels = torch.randn(2, 3, 112, 112).to(dtype)
    before = copy.deepcopy(model.state_dict())
    optimized = internvit.optimize_for_inference(model, pack=pack)
    output = optimized(pixels, output_hidden_states=True)
    with torch.no_grad():
        plain = model(pixels, output_hidden_states=True)
    truth = truth_of(model, pixels)
    allowed = 1.1 * relative_error(plain.last_hidden_state, truth) + torch.finfo(dtype).eps / 4
    assert relative_error(output.last_hidden_state, truth) < allowed
    assert len(output.hidden_states) == len(plain.hidden_states)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    assert list(optimized.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in optimized.state_dict().items())
    assert optimized.undo() is model


@packs
def test_packing_for_a_float32_stream_rounds_no_weight(seed: int) -> None:
    """LayerScale folded into bfloat16 weights rounds them once more: 3 % more error here."""
    model, pixels = small_model(VARIANTS[0], torch.bfloat16, seed), torch.randn(2, 3, 112, 112).bfloat16()
    folded = copy.deepcopy(model)
    for layer in folded.encoder.layers:
        for linear, gamma in ((layer.attn.proj, layer.ls1), (layer.mlp.fc2, layer.ls2)):
            linear.weight.data, linear.bias.data = fold_layer_scale(linear.weight.data, linear.bias.data, gamma.data)
            gamma.data.fill_(1)
    fast, rounded = (internvit.optimize_for_inference(m, out_dtype=torch.float32) for m in (model, folded))
    truth = truth_of(model, pixels)
    errors = [relative_error(m(pixels).last_hidden_state, truth) for m in (fast, rounded)]
    assert errors[0] < 0.985 * errors[1]


@packs
@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_another_residual_dtype_packs_again(dtype: torch.dtype | None) -> None:
    model, pixels = small_model(VARIANTS[0], torch.bfloat16, 0), torch.randn(1, 3, 112, 112).bfloat16()
    fast = internvit.optimize_for_inference(model, residual_dtype=torch.float32 if dtype is None else None)
    before = fast(pixels).last_hidden_state
    fast.residual_dtype = dtype
    fresh = internvit.optimize_for_inference(model, residual_dtype=dtype)
    assert torch.equal(fast(pixels).last_hidden_state, fresh(pixels).last_hidden_state)
    assert not torch.equal(fast(pixels).last_hidden_state, before)


@pytest.mark.parametrize("batch", [2, 3])
@pytest.mark.parametrize("onednn", [True, False])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(batch: int, onednn: bool, monkeypatch) -> None:
    monkeypatch.setattr("internvit.inference.linear.own_is_faster", lambda: not onednn)  # where the machine has both
    optimized = internvit.optimize_for_inference(small_model(VARIANTS[0], torch.bfloat16, 0))
    pixels = torch.randn(batch, 3, 112, 112, dtype=torch.bfloat16)
    tokens = optimized.model.embeddings(pixels)
    together = optimized(pixel_embeds=tokens).last_hidden_state
    assert torch.equal(together[:1], optimized(pixel_embeds=tokens[:1]).last_hidden_state)
    assert relative_error(together, truth_of(optimized.model, pixels)) < 0.05


@packs
def test_a_layer_with_a_hook_or_an_adapter_runs_as_it_is() -> None:
    model = small_model(VARIANTS[0], torch.bfloat16, 0)
    pixels = torch.randn(1, 3, 112, 112)
    seen = []
    model.encoder.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model.encoder.layers[2].mlp.fc1 = nn.Sequential(model.encoder.layers[2].mlp.fc1)
    optimized = internvit.optimize_for_inference(model)
    assert "1 of 3 layers packed" in repr(optimized)
    with torch.no_grad():
        assert relative_error(optimized(pixels).last_hidden_state, model(pixels).last_hidden_state) < 0.02
    assert len(seen) == 2


@packs
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_hooks_on_a_branch_run(part: str) -> None:
    model, seen = small_model(VARIANTS[0], torch.bfloat16, 0), []
    getattr(model.encoder.layers[1], part).register_forward_hook(lambda *_: seen.append(1))
    optimized = internvit.optimize_for_inference(model)
    assert "2 of 3 layers packed" in repr(optimized)
    optimized(torch.randn(1, 3, 112, 112))
    assert seen == [1]


def test_wrong_arguments_are_clear_errors() -> None:
    with pytest.raises(ValueError, match="must be an InternViT, got Linear"):
        internvit.optimize_for_inference(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="eval mode"):
        internvit.optimize_for_inference(small_model(VARIANTS[0], torch.float32, 0).train())


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = small_model(VARIANTS[0], torch.bfloat16, 0)
        pixels = torch.randn(1, 3, 112, 112)
        optimized = internvit.optimize_for_inference(model)
        assert relative_error(optimized(pixels).last_hidden_state, model(pixels).last_hidden_state) < 0.02


def test_float16_computes_what_the_model_does() -> None:
    """Nothing is folded where nothing is packed: gamma * weight would leave float16's normal range."""
    model = small_model(VARIANTS[0], torch.float16, 0)
    model.encoder.layers[0].ls1.data.fill_(1e-4)
    pixels = torch.randn(1, 3, 112, 112).half()
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    fast = internvit.optimize_for_inference(model, residual_dtype=None)
    assert torch.equal(fast(pixels).last_hidden_state, expected)
    assert relative_error(expected, truth_of(model, pixels)) < 2e-3


def test_folding_rounds_once() -> None:
    weight, bias, gamma = torch.randn(8, 4).bfloat16(), torch.randn(8).bfloat16(), torch.rand(8).bfloat16()
    folded, folded_bias = fold_layer_scale(weight, bias, gamma)
    assert torch.equal(folded, (weight.double() * gamma.double()[:, None]).bfloat16())
    assert torch.equal(folded_bias, (bias.double() * gamma.double()).bfloat16())
