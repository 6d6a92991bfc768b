"""The residual stream in float32 beside 16-bit weights."""

import copy

import pytest
import torch

import internvit
from internvit import InternViT
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, images, pair

tiny = pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])


def overflowing(name: str) -> tuple[InternViT, internvit.reference.InternViT]:
    """float16 weights with which one channel of the residual stream passes 65504, and the same in float64."""
    model, reference = pair(name)
    with torch.no_grad():
        for layer in model.encoder.layers:
            layer.mlp.fc2.bias[7] = 60000.0
            layer.ls2[7] = 0.8
    model.half()
    reference.load_state_dict(model.state_dict())
    return model, reference.double()


def other_channels(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., :7], x[..., 8:]], -1)


@tiny
def test_float16_with_a_float32_residual_stream(name) -> None:
    model, reference = overflowing(name)
    pixels = images(model.config, 2).half()
    truth = reference(pixels.double(), output_hidden_states=True).hidden_states
    assert truth[-1].abs().max() > 65504
    with torch.no_grad():
        assert not model(pixels).last_hidden_state.isfinite().all()
        model.residual_dtype = torch.float32
        out = model(pixels, output_hidden_states=True)
        assert {h.dtype for h in (*out.hidden_states, out.last_hidden_state, out.pooler_output)} == {torch.float32}
        for ours, expected in zip(out.hidden_states, truth, strict=True):
            assert relative_error(ours, expected) < 1e-3
            assert relative_error(other_channels(ours), other_channels(expected)) < 5e-3
        x = out.hidden_states[0]
        for layer, expected in zip(model.encoder.layers, out.hidden_states[1:], strict=True):
            x = layer(x)
            assert torch.equal(x, expected), "a layer alone gives the same bits"
        fast = internvit.optimize_for_inference(model)(pixels).last_hidden_state
        assert fast.dtype == torch.float32
        assert relative_error(other_channels(fast), other_channels(truth[-1])) < 5e-3
    backbone = internvit.InternViTBackbone.from_model(model, out_indices=(0, 2))
    for m, expected in zip(backbone(pixels), (truth[1], truth[3]), strict=True):
        assert m.dtype == torch.float32
        assert relative_error(m.flatten(2).transpose(1, 2), expected[:, 1:]) < 1e-3
    config = model.config.replace(num_hidden_layers=4)
    pyramid = InternViT(config, dtype=torch.float16, residual_dtype=torch.float32)
    levels = internvit.InternViTBackbone.from_model(pyramid, out_indices=(0, 1, 2, 3), fpn=True)(pixels)
    assert {level.dtype for level in levels} == {torch.float32}
    half = internvit.InternViTBackbone(config, (0, 1, 2, 3), fpn=True, dtype=torch.float16, out_dtype=torch.float32)
    half.encoder.residual_dtype = torch.float32
    assert all(level.isfinite().all() and level.dtype == torch.float32 for level in half(pixels))
    assert model.half().residual_dtype == torch.float32
    assert copy.deepcopy(model)(pixels).last_hidden_state.isfinite().all()


def test_a_float32_residual_stream_beside_packed_bfloat16_weights() -> None:
    """Where kernels add the residual in their epilogue they take bfloat16 alone: the op after it adds a float32 one."""
    model, reference = pair("tiny-layer_norm")
    model.bfloat16()
    reference.load_state_dict(model.state_dict())
    pixels = images(model.config, 2).bfloat16()
    truth = reference.double()(pixels.double()).last_hidden_state
    errors = []
    for dtype in (None, torch.float32):
        model.residual_dtype = dtype
        out = internvit.optimize_for_inference(model, residual_dtype=None)(pixels).last_hidden_state
        assert out.dtype == (dtype or torch.bfloat16)
        errors.append(relative_error(out, truth))
    assert errors[1] < errors[0]


@tiny
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_gradients_with_a_float32_residual_stream(name, mode) -> None:
    model, reference = overflowing(name)
    model.residual_dtype = torch.float32
    model.train().set_gradient_checkpointing(mode)
    pixels = images(model.config, 2).half()
    grads = []
    for m in (model, reference):
        out = m(pixels.to(next(m.parameters()).dtype)).last_hidden_state
        torch.tanh(other_channels(out)).square().mean().mul(256).backward()
        grads.append({n: p.grad.double() for n, p in m.named_parameters()})
    for n, grad in grads[0].items():
        assert grad.isfinite().all(), n
        # A gradient that is zero but for rounding, as that of k's bias, is measured against the others.
        scale = max(grads[1][n].norm(), 1e-3 * max(g.norm() for g in grads[1].values()))
        assert (grad - grads[1][n]).norm() < 0.03 * scale, n


def test_residual_dtype_is_kept_out_of_everything_else(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"residual_dtype: expected torch.float32 or None .* got torch.float16"):
        InternViT(CONFIGS["tiny-rms_norm"], residual_dtype=torch.float16)
    model = InternViT(
        CONFIGS["tiny-rms_norm"], dtype=torch.float16, residual_dtype=torch.float32, fold_layer_scale=True
    )
    model.save_pretrained(tmp_path)
    assert InternViT.from_pretrained(tmp_path).residual_dtype is None
    loaded = InternViT.from_pretrained(tmp_path, residual_dtype=torch.float32, fold_layer_scale=True)
    assert loaded.residual_dtype == torch.float32
    assert loaded.dtype == torch.float16
    assert all(layer.options.fold_layer_scale for layer in loaded.encoder.layers)
    with pytest.raises(ValueError, match="leaves float16's normal range"):
        loaded(images(model.config, 1).half())
    wide = InternViT(CONFIGS["tiny-rms_norm"]).eval()
    pixels = images(model.config, 1)
    expected = wide(pixels).last_hidden_state
    wide.residual_dtype = torch.float32
    assert torch.equal(wide(pixels).last_hidden_state, expected), "nothing changes for float32 weights"
