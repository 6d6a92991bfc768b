"""The fused model against the reference, transformers and timm, and everything a PyTorch user does with a module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import internvit
from internvit import InternViT, InternViTConfig
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, images, pair, random_weights, timm_judge, transformers_judge

tiny = pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers_in_float32_and_bfloat16(name) -> None:
    """float32: relative error <= 1e-5. bfloat16: the error against float64 is at most 1.02 times theirs."""
    model, reference = pair(name, **({"image_size": 224, "num_hidden_layers": 1} if name.startswith("6b") else {}))
    judge = transformers_judge(model.config, model.state_dict())
    pixels = images(model.config, 1 if model.config.hidden_size > 1000 else 4).bfloat16()
    with torch.no_grad():
        ours = model(pixels, output_hidden_states=True)
        theirs = judge(pixels, output_hidden_states=True)
        assert relative_error(ours.last_hidden_state, theirs.last_hidden_state) <= 1e-5
        for a, b in zip(ours.hidden_states[:-1], theirs.hidden_states[:-1], strict=True):
            assert relative_error(a, b) <= 1e-5
        assert relative_error(reference(pixels).last_hidden_state, theirs.last_hidden_state) <= 1e-5

        judge.bfloat16()
        model.bfloat16()
        reference.load_state_dict(model.state_dict())
        truth = reference.double()(pixels.double()).last_hidden_state
        allowed = relative_error(judge(pixels).last_hidden_state, truth)
        for rounding in ("fused", "reference"):
            model.set_rounding(rounding)
            error = relative_error(model(pixels).last_hidden_state, truth)
            print(f"{name} {rounding}: {error / allowed:.3f} of transformers' error {allowed:.2e}")
            assert error <= 1.02 * allowed


def test_float32_agrees_with_timm() -> None:
    model, _ = pair("300m-2-layers")
    judge = timm_judge(model.config, model.state_dict())
    pixels = images(model.config, 1)
    with torch.no_grad():
        assert relative_error(model(pixels).last_hidden_state, judge.forward_features(pixels)) <= 1e-5


def test_norms_of_q_and_k_with_an_eps_each() -> None:
    """Attention takes one eps inside: it gave k that of q."""
    models = pair("tiny-rms_norm")
    for layer in (layer for model in models for layer in model.encoder.layers):
        layer.attn.k_norm.eps = 0.5
    pixels = images(models[0].config, 2)
    with torch.no_grad():
        whole = models[1](pixels, output_attentions=True)
        for asked, of_map in ROWS.items():
            out = models[0](pixels, output_attentions=asked)
            assert relative_error(out.last_hidden_state, whole.last_hidden_state) < 1e-5
            for ours, theirs in zip(out.attentions, whole.attentions, strict=True):
                assert relative_error(ours, of_map(theirs)) < 1e-5
        assert relative_error(models[0](pixels).last_hidden_state, whole.last_hidden_state) < 1e-5


@tiny
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_of_the_reference(name, training) -> None:
    model, reference = pair(name, drop_path_rate=0.4)
    pixels = images(model.config, 3)
    results = []
    for m in (model, reference):
        m.train(training)
        torch.manual_seed(5)
        out = m(pixels, output_hidden_states=True, output_attentions=True)
        out.last_hidden_state.square().mean().backward()
        results.append((out, {n: p.grad for n, p in m.named_parameters()}))
    (ours, our_grads), (theirs, their_grads) = results
    assert ours.pooler_output.shape == (3, model.config.hidden_size)
    for a, b in zip((*ours.hidden_states, *ours.attentions), (*theirs.hidden_states, *theirs.attentions), strict=True):
        assert relative_error(a, b) < 1e-5
    assert our_grads.keys() == their_grads.keys()
    for n, grad in our_grads.items():
        assert relative_error(grad, their_grads[n]) < 1e-4, n


@tiny
def test_a_tuple_and_hidden_states(name) -> None:
    model, _ = pair(name)
    pixels = images(model.config, 2)
    out = model(pixels)
    assert out.hidden_states is out.attentions is None
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])
    last, pooled, hidden = model(pixels, output_hidden_states=True, return_dict=False)
    assert len(hidden) == model.config.num_hidden_layers + 1
    assert torch.equal(hidden[-1], last)
    assert torch.equal(model(pixel_embeds=hidden[0]).last_hidden_state, last)
    assert torch.equal(pooled, out.pooler_output)


@tiny
def test_layers_called_alone_hooked_or_threaded_give_the_same_bits(name) -> None:
    model, _ = pair(name)
    model.bfloat16()
    pixels = images(model.config, 2)
    expected = model(pixels, output_hidden_states=True).hidden_states
    x = expected[0]
    for layer, wanted in zip(model.encoder.layers, expected[1:], strict=True):
        x = layer(x)
        assert torch.equal(x, wanted)
    seen = []
    middle = model.encoder.layers[1]
    for module in (middle, middle.norm1, middle.norm2, middle.attn.proj, middle.mlp.fc1):
        handle = module.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
        found = model(pixels).last_hidden_state
        if isinstance(module, nn.Linear) and torch.backends.cpu.get_cpu_capability() == "AVX2":
            assert relative_error(found, expected[-1]) < 2e-3  # PyTorch emulates the product of a hooked Linear
        else:
            assert torch.equal(found, expected[-1])
        handle.remove()
    assert seen == ["InternViTLayer", *[type(middle.norm1).__name__] * 2, "Linear", "Linear"]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", ["300m-2-layers", "6b-2-layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_image_has_the_same_features_alone_and_in_any_batch(name, dtype, seed: int) -> None:
    """In batches of 2, 3 and 8 of 257 tokens; of more tokens, and of the 6B, of 2 or 3, for time."""
    small = name.startswith("300m")
    model = InternViT(CONFIGS[name].replace(num_hidden_layers=1), dtype=dtype).eval()
    random_weights(model)
    for size in (224, 448, 504) if small else (224,):  # 257, 1025 and 1297 tokens
        batches = (2, 3, 8) if small and size == 224 else (2 + (seed + size) % 2,)
        pixels = torch.randn(max(batches), 3, size, size)
        with torch.no_grad():
            alone = model(pixels[:1]).last_hidden_state
            for batch in batches:
                assert torch.equal(model(pixels[:batch]).last_hidden_state[:1], alone), (size, batch)


def test_a_replaced_linear_falls_back_for_its_layer_alone() -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.base(x) + 1

    model, reference = pair("tiny-rms_norm")
    pixels = images(model.config, 1)
    adapters = []
    for m in (model, reference):
        layer = m.encoder.layers[1]
        layer.mlp.fc1, layer.attn.qkv = Adapter(layer.mlp.fc1), Adapter(layer.attn.qkv)
        adapters.append(layer.mlp.fc1)
    assert relative_error(model(pixels).last_hidden_state, reference(pixels).last_hidden_state) < 1e-5
    assert [a.calls for a in adapters] == [1, 1]


@tiny
def test_gradient_checkpointing(name, monkeypatch) -> None:
    model, _ = pair(name, drop_path_rate=0.4)
    pixels = images(model.config, 2)
    calls = []
    monkeypatch.setattr("internvit.model.encoder.checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))

    def grads() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(9)
        model(pixels).last_hidden_state.square().mean().backward()
        return [p.grad.clone() for p in model.parameters()]

    model.train()
    plain = grads()
    model.gradient_checkpointing_enable()
    assert all(map(torch.equal, grads(), plain))
    assert len(calls) == model.config.num_hidden_layers
    model.eval()
    grads()
    model.train()
    with torch.no_grad():
        model(pixels)
    assert len(calls) == model.config.num_hidden_layers
    model.gradient_checkpointing_disable()
    grads()
    assert len(calls) == model.config.num_hidden_layers


def test_position_embedding_of_any_grid_follows_the_parameter() -> None:
    model, reference = pair("tiny-layer_norm")
    pixels = torch.randn(1, 3, 70, 98)
    with torch.no_grad():
        first = model(pixels).last_hidden_state
        assert relative_error(first, reference(pixels).last_hidden_state) < 1e-5
        for parameters in (model, reference):
            parameters.embeddings.position_embedding.mul_(2)
        assert not torch.equal(model(pixels).last_hidden_state, first)
        for parameters in (model, reference):  # as EMA and weight synchronisation do: no version counts it
            parameters.embeddings.position_embedding.data.mul_(1.5)
        assert relative_error(model(pixels).last_hidden_state, reference(pixels).last_hidden_state) < 1e-5
        assert model.bfloat16().embeddings.position_embedding_for((5, 7)).dtype == torch.bfloat16
    with torch.inference_mode():
        model(pixels)
    assert model(pixels).last_hidden_state.requires_grad
    model(pixels).last_hidden_state.sum().backward()
    assert model.embeddings.position_embedding.grad.any()


def test_resize_pos_embeddings() -> None:
    model, reference = pair("tiny-layer_norm")
    pixels = torch.randn(1, 3, 84, 84)
    expected = reference(pixels).last_hidden_state
    model.resize_pos_embeddings(56, 84, 14)
    assert model.config.image_size == model.embeddings.config.image_size == 84
    assert model.embeddings.position_embedding.shape == (1, 37, 96)
    assert relative_error(model(pixels).last_hidden_state, expected) < 1e-5
    for arguments, message in (
        ((56, 98, 14), "old_size must be this model's 84, got 56"),
        ((84, 98, 16), "patch_size must be this model's 14, got 16"),
        ((84, 90, 14), "image_size must be one or two positive multiples of patch_size=14, got 90"),
    ):
        with pytest.raises(ValueError, match=message):
            model.resize_pos_embeddings(*arguments)


@pytest.mark.sampled(2)
@tiny
def test_compile_whole_inference_and_training(name) -> None:
    torch._dynamo.reset()
    model, _ = pair(name, num_hidden_layers=2)
    pixels = images(model.config, 2)
    eager = model(pixels).last_hidden_state
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(pixels).last_hidden_state, eager) < 1e-5
    grads = torch.autograd.grad(eager.square().sum(), list(model.parameters()))
    out = compiled(pixels).last_hidden_state
    for a, b in zip(torch.autograd.grad(out.square().sum(), list(model.parameters())), grads, strict=True):
        assert relative_error(a, b) < 1e-4


@tiny
def test_export(name) -> None:
    model, _ = pair(name)
    pixels = images(model.config, 2)
    with torch.no_grad():
        program = torch.export.export(model, (pixels,))
        # A traced graph runs a batch's Linears at once, eager an image at a time: other blocking, other last bits.
        assert relative_error(program.module()(pixels).last_hidden_state, model(pixels).last_hidden_state) < 1e-6
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        again = torch.export.load(buffer).module()(pixels)
        assert torch.equal(again.last_hidden_state, program.module()(pixels).last_hidden_state)


@tiny
def test_copies(name) -> None:
    model, _ = pair(name)
    pixels = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(pixels).last_hidden_state, expected)


def test_the_meta_device_holds_the_largest_model() -> None:
    config = InternViTConfig.from_name("internvit-6b-448px-v2.5")
    model = InternViT(config, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters() == 5_536_496_000
    out = model(torch.empty(2, 3, 448, 448, device="meta"))
    assert out.last_hidden_state.shape == (2, 1025, 3200)
    assert out.last_hidden_state.dtype == torch.bfloat16


def test_pixels_are_cast_to_the_weights() -> None:
    model, _ = pair("tiny-rms_norm")
    model.bfloat16()
    pixels = images(model.config, 1)
    assert torch.equal(model(pixels).last_hidden_state, model(pixels.bfloat16()).last_hidden_state)


@tiny
def test_autocast_trains(name) -> None:
    model, reference = pair(name)
    pixels = images(model.config, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(pixels).last_hidden_state
    out.float().square().mean().backward()
    assert relative_error(out, reference(pixels).last_hidden_state) < 0.02
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert relative_error(model(pixels).last_hidden_state, out) < 0.02
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_attention_maps_are_the_references() -> None:
    model, reference = pair("tiny-rms_norm")
    pixels = images(model.config, 1)
    ours, theirs = (m(pixels, output_attentions=True).attentions for m in (model, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < 1e-5


ROWS = {"class": lambda whole: whole[:, :, 0], "columns": lambda whole: whole.sum(-2)}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["tiny-rms_norm", "tiny-layer_norm"])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_those_of_the_maps(name, kind) -> None:
    """By each backend, with hooks and checkpointing, from the optimised model, and compiled; the features stay as they
    are."""
    model, reference = pair(name)
    pixels = images(model.config, 2)
    maps = model(pixels, output_attentions=True).attentions

    def compare(which, m) -> None:
        out = m(pixels, output_attentions=kind)
        assert torch.equal(out.last_hidden_state, m(pixels).last_hidden_state), which
        assert out.hidden_states is None
        for row, whole in zip(out.attentions, maps, strict=True):
            assert row.shape == (2, model.config.num_attention_heads, whole.shape[-1])
            assert relative_error(row, ROWS[kind](whole)) < 1e-5, which

    compare("model", model)
    compare("reference", reference)
    compare("optimised", internvit.optimize_for_inference(model))
    for backend in ("reference", "sdpa"):
        with internvit.backend(backend):
            compare(backend, model)
    if name == "tiny-rms_norm":
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            for row, whole in zip(compiled(pixels, output_attentions=kind).attentions, maps, strict=True):
                assert relative_error(row, ROWS[kind](whole)) < 1e-5
    model.train()
    for mode in ("block", "selective", "none"):
        model.set_gradient_checkpointing(mode)
        compare(mode, model)
    model.eval()
    layers = model.encoder.layers
    for module, calls in ((layers[0].attn.qkv, 2), (layers[0].attn, 2), (layers[1], 2)):
        seen = []
        hook = module.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        compare("hooked", model)
        assert len(seen) == calls  # once in each forward: what is reported is of the forward's own q and k
        compare("hooked, optimised", internvit.optimize_for_inference(model))
        hook.remove()


@pytest.mark.parametrize("name", ["tiny-rms_norm", "tiny-layer_norm"])
def test_gradients_of_rows(name) -> None:
    model, _ = pair(name)
    pixels = images(model.config, 2)
    sum(row[..., 0].sum() for row in model(pixels, output_attentions="class").attentions).backward()
    grads = [model.encoder.layers[0].attn.qkv.weight.grad, *(p.grad for p in model.embeddings.parameters())]
    model.zero_grad()
    sum(whole[:, :, 0, 0].sum() for whole in model(pixels, output_attentions=True).attentions).backward()
    expected = [model.encoder.layers[0].attn.qkv.weight.grad, *(p.grad for p in model.embeddings.parameters())]
    for a, b in zip(grads, expected, strict=True):
        assert relative_error(a, b) < 1e-4
    model(pixels, output_attentions="columns").last_hidden_state.sum().backward()
    with pytest.raises(RuntimeError, match="attention_column_sums has no derivative"):
        model(pixels, output_attentions="columns").attentions[0].sum().backward()


@pytest.mark.parametrize("precision", [None, "int8"])
def test_column_sums_in_bfloat16_add_up_to_the_tokens(precision) -> None:
    """Also of int8's own q and k: each row of what the block multiplied is a softmax."""
    model, _ = pair("tiny-rms_norm")
    pixels = images(model.config, 2)
    exact = model(pixels, output_attentions="columns").attentions
    fast = internvit.optimize_for_inference(
        model.bfloat16(), precision=precision, skip=None if precision is None else ()
    )
    for sums, truth in zip(fast(pixels, output_attentions="columns").attentions, exact, strict=True):
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums.sum(-1), truth.sum(-1), rtol=3e-4, atol=0)
        assert relative_error(sums, truth) < 0.02


def test_another_kind_of_attentions_is_an_error() -> None:
    model, _ = pair("tiny-rms_norm")
    for m in (model, internvit.optimize_for_inference(model)):
        with pytest.raises(
            ValueError, match="output_attentions: expected False, True, 'class' or 'columns', got 'rows'"
        ):
            m(images(model.config, 1), output_attentions="rows")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give pixel_values or pixel_embeds, got neither"),
        (dict(pixel_values=torch.ones(1, 3, 56, 56), pixel_embeds=torch.ones(1, 17, 96)), "got both"),
        (dict(pixel_values=torch.ones(1, 4, 56, 56)), r"expected \[batch, 3, height, width\], got \[1, 4, 56, 56\]"),
        (dict(pixel_values=torch.ones(3, 56, 56)), r"expected \[batch, 3, height, width\], got \[3, 56, 56\]"),
        (dict(pixel_values=torch.ones(1, 3, 57, 56)), "multiples of patch_size=14, got 57x56; resize to 56x56"),
        (dict(pixel_embeds=torch.ones(1, 17, 95)), r"pixel_embeds: expected \[batch, tokens, 96\], got \[1, 17, 95\]"),
    ],
)
def test_bad_input(arguments, message) -> None:
    for model in pair("tiny-layer_norm")[:1]:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


def test_bad_construction() -> None:
    with pytest.raises(ValueError, match="config must be an InternViTConfig, got dict"):
        InternViT({})
    with pytest.raises(ValueError, match="rounding must be one of 'fused', 'reference', got 'exact'"):
        InternViT(CONFIGS["tiny-rms_norm"], rounding="exact")
    with pytest.raises(ValueError, match="static' never resizes"):
        InternViT(CONFIGS["tiny-rms_norm"].replace(pos_embed_mode="static"))(torch.ones(1, 3, 70, 70))


def test_training_follows_the_reference_for_20_steps() -> None:
    model, reference = pair("tiny-rms_norm", drop_path_rate=0.2)
    losses = []
    pixels, target = images(model.config, 4), torch.randn(4, model.config.hidden_size)
    for m in (model, reference):
        m.train()
        torch.manual_seed(11)
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3)
        history = []
        for _ in range(20):
            optimizer.zero_grad()
            loss = F.mse_loss(m(pixels).last_hidden_state.mean(1), target)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        losses.append(history)
    assert losses[0][-1] < 0.7 * losses[0][0]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=0)
    for (n, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert relative_error(a, b) < 1e-2, n
