"""What a model is called with and what it returns: pixels of every kind, outputs by name, switches, threads."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import internvit
from internvit import InternViT
from tests.support.models import CONFIGS, images, random_weights, replicate


def tiny(norm_type: str = "layer_norm") -> InternViT:
    model = InternViT(CONFIGS[f"tiny-{norm_type}"]).eval()
    random_weights(model)
    return model


def callers() -> dict:
    """Everything that takes pixels."""
    model = tiny()
    return {
        "model": model,
        "reference": internvit.reference.InternViT(model.config),
        "backbone": internvit.InternViTBackbone.from_model(model, out_indices=(0, 2)),
        "optimized": internvit.optimize_for_inference(model),
        "forward_intermediates": model.forward_intermediates,
    }


@pytest.mark.parametrize("name", callers())
def test_pixels_that_are_no_floating_point_tensor(name) -> None:
    call = callers()[name]
    for dtype in (torch.uint8, torch.int64, torch.bool):
        with pytest.raises(TypeError, match=rf"floating-point pixels, got {dtype}; divide by 255 and normalise"):
            call(torch.ones(1, 3, 56, 56, dtype=dtype))
    for dtype in (torch.complex64, torch.complex128):
        with pytest.raises(TypeError, match=rf"floating-point pixels, got {dtype}$"):
            call(torch.ones(1, 3, 56, 56, dtype=dtype))
    for pixels, kind in (
        (np.zeros((1, 3, 56, 56), np.float32), r"numpy\.ndarray"),
        ([[0.0]], r"builtins\.list"),
        ("cat.jpg", r"builtins\.str"),
    ):
        with pytest.raises(TypeError, match=rf"expected a torch\.Tensor \[batch, 3, height, width\], got a {kind}"):
            call(pixels)


def test_transformers_model_checks_its_pixels() -> None:
    pytest.importorskip("transformers")
    from internvit.integrations.transformers import InternVisionConfig, InternVisionModel

    model = InternVisionModel(InternVisionConfig(**CONFIGS["tiny-layer_norm"].to_dict()))
    with pytest.raises(TypeError, match=r"floating-point pixels, got torch\.uint8"):
        model(torch.ones(1, 3, 56, 56, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pixel_embeds: expected \[batch, tokens, 96\], got \[1, 17, 95\]"):
        model(pixel_embeds=torch.ones(1, 17, 95))


def test_partitioned_parameters_are_named() -> None:
    """As DeepSpeed's ZeRO-3 leaves them outside its engine."""
    model = tiny()
    model.embeddings.position_embedding.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"position_embedding: expected shape \[1, 17, 96\], got \[0\].*ZeRO-3"):
        model(images(model.config, 1))


def test_outputs_by_name_as_transformers_gives_them() -> None:
    model = tiny()
    out = model(images(model.config, 2))
    assert out["last_hidden_state"] is out.last_hidden_state is out[0]
    assert out["hidden_states"] is None
    assert out.keys() == ("last_hidden_state", "pooler_output")
    assert [name for name, _ in out.items()] == list(out.keys())
    assert all(a is b for a, b in zip(out.values(), out.to_tuple(), strict=True))
    assert "pooler_output" in out
    assert "attentions" not in out
    assert "count" not in out
    assert out.get("pooler_output") is out.pooler_output
    assert out.get("attentions", 3) == 3
    assert dict(**out).keys() == {"last_hidden_state", "pooler_output"}
    assert len(out[:2]) == 2
    _, pooled, *_ = out
    assert pooled is out.pooler_output
    with pytest.raises(KeyError, match=r"expected one of last_hidden_state, pooler_output, hidden_states, attentions"):
        out["logits"]
    every = model(images(model.config, 1), output_hidden_states=True, output_attentions=True)
    assert len(every["hidden_states"]) == 4
    assert every.keys() == every._fields


@pytest.mark.parametrize(
    "kwargs",
    [None, {"use_reentrant": False}, {"use_reentrant": True}, {"use_reentrant": False, "preserve_rng_state": True}],
)
def test_gradient_checkpointing_as_trainer_asks_for_it(kwargs) -> None:
    model = tiny()
    pixels = images(model.config, 2)

    def grads() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(pixels).last_hidden_state.square().mean(), list(model.parameters())))

    model.train()
    expected = grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    assert model.encoder.gradient_checkpointing
    assert all(map(torch.equal, grads(), expected))
    model.gradient_checkpointing_disable()
    assert not model.encoder.gradient_checkpointing


def test_unknown_checkpointing_arguments_are_refused_and_known_ones_arrive(monkeypatch) -> None:
    model = tiny().train()
    with pytest.raises(
        ValueError, match=r"gradient_checkpointing_kwargs: expected .*use_reentrant, got \['reentrant'\]"
    ):
        model.gradient_checkpointing_enable({"reentrant": True})
    assert not model.encoder.gradient_checkpointing
    seen = []
    monkeypatch.setattr("internvit.model.encoder.checkpoint", lambda f, x, **more: seen.append(more) or f(x))
    model.gradient_checkpointing_enable({"use_reentrant": True, "determinism_check": "none"})
    model(images(model.config, 1))
    assert seen == [{"use_reentrant": False, "determinism_check": "none"}] * 3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_sixteen_threads_at_many_sizes(norm_type) -> None:
    model = tiny(norm_type)
    inputs = [torch.randn(1, 3, 14 * (1 + i % 5), 14 * (1 + i % 7)) for i in range(16)]

    def run(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(pixels).last_hidden_state

    def grads(pixels: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(model(pixels).last_hidden_state.square().mean(), model.embeddings.class_embedding)[0]

    expected, gradients = [run(x) for x in inputs], [grads(x) for x in inputs]
    # Not the same bits: on a loaded machine MKL takes fewer threads, and sums float32 products in another order.
    with ThreadPoolExecutor(16) as pool:
        for _ in range(4):
            torch.testing.assert_close(list(pool.map(run, inputs)), expected)
            torch.testing.assert_close(list(pool.map(grads, inputs)), gradients)


@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_replicas_and_copies_run_their_own_parameters(norm_type) -> None:
    model = tiny(norm_type)
    pixels = images(model.config, 2)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.25)
    assert not torch.equal(scaled(pixels).last_hidden_state, model(pixels).last_hidden_state)
    out = replicate(model, 1.25)(pixels).last_hidden_state
    torch.testing.assert_close(out, scaled(pixels).last_hidden_state)
    out.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_copies_have_options_of_their_own() -> None:
    model = tiny()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.set_gradient_checkpointing("selective")
        assert {layer.options.checkpointing for layer in other.encoder.layers} == {"selective"}
        assert {layer.options.checkpointing for layer in model.encoder.layers} == {"none"}
