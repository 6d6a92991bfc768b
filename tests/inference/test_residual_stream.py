"""`optimize_for_inference` carries the residual stream of 16-bit models in float32 on a CPU."""

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit.numerics import relative_error
from tests.inference.test_optimize import VARIANTS, small_model, truth_of

HALVES = [torch.bfloat16, torch.float16]


def outlier_model(variant: str, dtype: torch.dtype, seed: int = 0, depth: int = 8) -> internvit.InternViT:
    """Branches of a tenth of the stream, and two channels some hundred times larger, as trained InternViTs have."""
    model = small_model(variant, torch.float32, seed)
    layers = model.encoder.layers
    config = model.config.replace(num_hidden_layers=depth)
    deep = internvit.InternViT(config).eval()
    for index, layer in enumerate(deep.encoder.layers):
        layer.load_state_dict(layers[index % len(layers)].state_dict())
        for gamma in (layer.ls1, layer.ls2):
            gamma.data *= 0.1
        layer.norm1.weight.data[[3, 200]] = layer.norm2.weight.data[[3, 200]] = 0.02
        layer.mlp.fc2.bias.data[[3, 200]] = 500.0
    return deep.to(dtype)


def other_channels(x: Tensor) -> Tensor:
    return torch.cat([x[..., :3], x[..., 4:200], x[..., 201:]], -1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_the_error_of_a_16_bit_stream(variant: str, dtype: torch.dtype, seed: int) -> None:
    model = outlier_model(variant, dtype, seed)
    pixels = torch.randn(2, 3, 112, 112).to(dtype)
    truth, errors = truth_of(model, pixels), {}
    for residual_dtype in ("auto", None):
        fast = internvit.optimize_for_inference(model, residual_dtype=residual_dtype, out_dtype=torch.float32)
        features = fast(pixels).last_hidden_state
        errors[residual_dtype] = relative_error(other_channels(features), other_channels(truth))
    print(f"{variant} {dtype}: {errors['auto']:.2e} with a float32 stream, {errors[None]:.2e} without")
    assert errors["auto"] <= 0.5 * errors[None]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_features_have_the_models_dtype_or_the_one_asked_for(dtype: torch.dtype) -> None:
    model = outlier_model(VARIANTS[0], dtype, depth=2)
    pixels = torch.randn(1, 3, 112, 112).to(dtype)

    def dtypes(**settings: object) -> set[torch.dtype]:
        fast = internvit.optimize_for_inference(model, **settings)
        out = fast(pixels, output_hidden_states=True)
        plain = fast(pixels, return_dict=False)
        with_maps = fast(pixels, output_attentions=True)
        assert with_maps.attentions[0].dtype == dtype
        assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
        assert torch.equal(plain[0], out.last_hidden_state)
        tensors = (*out.hidden_states, out.last_hidden_state, out.pooler_output, *plain, *with_maps[:2])
        return {t.dtype for t in tensors}

    assert dtypes() == dtypes(residual_dtype=None) == dtypes(residual_dtype=torch.float32) == {dtype}
    assert dtypes(out_dtype=torch.float32) == {torch.float32}
    model.residual_dtype = torch.float32
    assert dtypes() == {torch.float32}, "as the model returns them"
    assert dtypes(out_dtype=dtype) == {dtype}


def test_the_model_keeps_its_own_stream(tmp_path) -> None:
    model = outlier_model(VARIANTS[0], torch.bfloat16, depth=2)
    pixels = torch.randn(1, 3, 112, 112, dtype=torch.bfloat16)
    with torch.no_grad():
        before = model(pixels).last_hidden_state
    fast = internvit.optimize_for_inference(model)
    fast(pixels)
    assert model.residual_dtype is None
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, before)
    maps = internvit.InternViTBackbone.from_model(fast.undo(), out_indices=(0, 1))(pixels)
    assert {m.dtype for m in maps} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    loaded = internvit.InternViT.from_pretrained(tmp_path)
    assert loaded.residual_dtype is None
    assert torch.equal(internvit.optimize_for_inference(loaded)(pixels).last_hidden_state, fast(pixels)[0])


@pytest.mark.parametrize("pack", [True, False])
def test_an_image_alone_and_in_a_batch(pack: bool) -> None:
    fast = internvit.optimize_for_inference(outlier_model(VARIANTS[0], torch.bfloat16, depth=2), pack=pack)
    tokens = fast.model.embeddings(torch.randn(3, 3, 112, 112, dtype=torch.bfloat16))
    together = fast(pixel_embeds=tokens, output_hidden_states=True).hidden_states
    for i in range(3):
        alone = fast(pixel_embeds=tokens[i : i + 1], output_hidden_states=True).hidden_states
        assert all(torch.equal(a, t[i : i + 1]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("residual_dtype", ["auto", torch.float32])
def test_modified_layers_get_the_models_dtype(residual_dtype) -> None:
    """Replaced parts, such as a norm that another package fuses, may take no other."""
    model, seen = outlier_model(VARIANTS[0], torch.bfloat16, depth=3), []
    model.encoder.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    model.encoder.layers[1].register_forward_hook(lambda module, args, out: seen.extend((args[0].dtype, out.dtype)))
    model.encoder.layers[2].norm1 = nn.LayerNorm(256, dtype=torch.bfloat16)
    pixels = torch.randn(1, 3, 112, 112, dtype=torch.bfloat16)
    fast = internvit.optimize_for_inference(model, residual_dtype=residual_dtype)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    seen.clear()
    assert relative_error(fast(pixels).last_hidden_state, expected) < 0.02
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 3


def test_a_model_cast_or_changed_later() -> None:
    model = outlier_model(VARIANTS[0], torch.float32, depth=2)
    fast, pixels = internvit.optimize_for_inference(model), torch.randn(1, 3, 112, 112)
    truth = truth_of(model, pixels)
    assert relative_error(fast(pixels).last_hidden_state, truth) < 1e-5
    model.bfloat16()
    with torch.no_grad():
        assert relative_error(fast(pixels).last_hidden_state, model(pixels).last_hidden_state) < 0.02
    assert fast(pixels).last_hidden_state.dtype == torch.bfloat16
    model.residual_dtype = torch.float32
    assert fast(pixels).last_hidden_state.dtype == torch.float32


def test_wrong_dtypes_are_clear_errors() -> None:
    model = outlier_model(VARIANTS[0], torch.bfloat16, depth=1)
    with pytest.raises(ValueError, match=r"residual_dtype must be 'auto', torch.float32 or None .* got torch.float16"):
        internvit.optimize_for_inference(model, residual_dtype=torch.float16)
    with pytest.raises(ValueError, match="out_dtype must be a floating dtype or None, got 'float32'"):
        internvit.optimize_for_inference(model, out_dtype="float32")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"precision": "int8"}, {"pack": False}, {"residual_dtype": None}], ids=str)
def test_float32_norms_beside_16_bit_linears(variant: str, options: dict, seed: int) -> None:
    """As many trainers keep them: a float32 stream left such a norm in float32, which no Linear behind it takes."""
    model = small_model(variant, torch.bfloat16, seed)
    pixels = torch.randn(1, 3, 112, 112).bfloat16()
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        for layer in model.encoder.layers:
            layer.norm1.float()
            layer.norm2.float()
        for residual_dtype in (None, torch.float32):
            model.residual_dtype = residual_dtype
            assert relative_error(model(pixels).last_hidden_state, expected) < 0.02
    model.residual_dtype = None
    optimized = internvit.optimize_for_inference(model, **options)
    assert relative_error(optimized(pixels).last_hidden_state, expected) < 0.05
