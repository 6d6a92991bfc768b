"""The specification against independent implementations: transformers and timm."""

import pytest
import torch

import internvit
from internvit.numerics import relative_error
from internvit.reference import Numerics
from tests.support.models import CONFIGS, images, random_weights, timm_judge, transformers_judge


@pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm", "300m-2-layers"])
def test_agrees_with_transformers(name) -> None:
    config = CONFIGS[name]
    model = internvit.reference.InternViT(config).eval()
    random_weights(model)
    judge = transformers_judge(config, model.state_dict())
    pixels = images(config, 1 if config.num_tokens > 1000 else 2)
    with torch.no_grad():
        ours, theirs = model(pixels, output_hidden_states=True), judge(pixels, output_hidden_states=True)
    assert relative_error(ours.last_hidden_state, theirs.last_hidden_state) <= 1e-5
    assert len(ours.hidden_states) == len(theirs.hidden_states) == config.num_hidden_layers + 1
    for a, b in zip(ours.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
        assert relative_error(a, b) <= 1e-5


def test_agrees_with_timm() -> None:
    config = CONFIGS["tiny-layer_norm"]
    model = internvit.reference.InternViT(config).eval()
    random_weights(model)
    judge = timm_judge(config, model.state_dict())
    pixels = images(config, 2)
    with torch.no_grad():
        assert relative_error(model(pixels).last_hidden_state, judge.forward_features(pixels)) <= 1e-5


@pytest.mark.parametrize("mode", ["param_dtype", "antialias", "float32"])
def test_position_embedding_modes_are_their_upstreams(mode) -> None:
    config = CONFIGS["tiny-layer_norm"].replace(pos_embed_mode=mode)
    model = internvit.reference.InternViT(config).eval()
    random_weights(model)
    pixels = torch.randn(1, 3, 84, 126)
    with torch.no_grad():
        out = model(pixels).last_hidden_state
        if mode == "antialias":
            judge = timm_judge(config, model.state_dict(), dynamic_img_size=True).forward_features(pixels)
        else:
            judge = transformers_judge(config, model.state_dict())(pixels, interpolate_pos_encoding=True)
            judge = judge.last_hidden_state
    assert relative_error(out, judge) <= 1e-5


def test_bfloat16_position_embedding_by_mode() -> None:
    position = torch.randn(1, 1 + 32 * 32, 64).bfloat16()
    resized = {
        mode: internvit.reference.resize_position_embedding(position, (32, 32), (36, 36), mode)
        for mode in ("float32", "param_dtype", "antialias")
    }
    assert torch.equal(resized["float32"][:, 0], position[:, 0])
    assert 0.2 < (resized["float32"] != resized["param_dtype"]).double().mean() < 0.6
    assert relative_error(resized["antialias"], resized["float32"]) > 0.01


def test_each_numerics_switch_changes_bits_and_little_else() -> None:
    config = CONFIGS["tiny-rms_norm"].replace(hidden_size=176, num_attention_heads=2, intermediate_size=352)
    base = internvit.reference.InternViT(config).eval()
    random_weights(base)
    pixels = torch.randn(1, 3, 56, 56).bfloat16()
    with torch.no_grad():
        truth = internvit.reference.InternViT(config).double().eval()
        truth.load_state_dict(base.bfloat16().state_dict())
        exact = truth(pixels.double()).last_hidden_state
        plain = base(pixels).last_hidden_state
        for switch in ("weight_before_cast", "scale_scores", "float32_softmax"):
            model = internvit.reference.InternViT(config, Numerics(**{switch: True})).bfloat16().eval()
            model.load_state_dict(base.state_dict())
            other = model(pixels).last_hidden_state
            assert not torch.equal(other, plain), switch
            assert relative_error(other, exact) < 2 * relative_error(plain, exact)


def test_promoted_norm_output() -> None:
    norm = internvit.reference.RMSNorm(8, 1e-6, Numerics(promote_norm=True))
    assert norm(torch.randn(2, 8).bfloat16()).dtype == torch.float32
    assert internvit.reference.RMSNorm(8, 1e-6)(torch.randn(2, 8).bfloat16()).dtype == torch.bfloat16


def test_attention_maps_are_probabilities() -> None:
    config = CONFIGS["tiny-rms_norm"]
    out = internvit.reference.InternViT(config).eval()(images(config, 2), output_attentions=True)
    assert len(out.attentions) == config.num_hidden_layers
    for attention in out.attentions:
        assert attention.shape == (2, config.num_attention_heads, config.num_tokens, config.num_tokens)
        torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))


def test_drop_path_keeps_the_expectation_and_checkpointing_the_gradients() -> None:
    config = CONFIGS["tiny-layer_norm"].replace(drop_path_rate=0.5)
    model = internvit.reference.InternViT(config).train()
    pixels = images(config, 4)
    grads = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(3)
        model(pixels).last_hidden_state.square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *grads))
    scale = internvit.reference.drop_path_scale(20000, 0.3, torch.device("cpu"))
    assert abs(scale.mean().item() - 1) < 0.03
    assert scale.unique().tolist() == [0.0, pytest.approx(1 / 0.7)]
