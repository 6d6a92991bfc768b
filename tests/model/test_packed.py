"""Lists of images of several sizes: the features and gradients of the images one by one."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit import InternViT, InternViTBackbone, PackedTokens
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, random_weights

SIZES = [(56, 56), (28, 42), (14, 14), (56, 56), (70, 42), (28, 42)]
tiny = pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> InternViT:
    model = InternViT(CONFIGS[name].replace(**changes), dtype=dtype)
    random_weights(model)
    return model.eval()


def photos(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(3, *size, dtype=dtype) for size in SIZES]


def states(output: Any) -> list[Any]:
    return [output.last_hidden_state, *output.hidden_states]


@tiny
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rounding", ["fused", "reference"])
@torch.no_grad()
def test_an_image_has_the_same_bits_alone_batched_and_packed(name, dtype, rounding) -> None:
    model, pixels = build(name, dtype), photos()
    model.set_rounding(rounding)
    packed = model(pixels, output_hidden_states=True)
    again = model(pixel_embeds=internvit.model.packed.pack_images(model.embeddings, pixels))
    assert torch.equal(again.last_hidden_state.values, packed.last_hidden_state.values)
    batch = model(torch.stack([pixels[0], pixels[3]])).last_hidden_state
    same = torch.equal if dtype != torch.float64 else torch.allclose  # no library has float64
    assert same(batch[1], packed.last_hidden_state[3])
    for i, image in enumerate(pixels):
        alone = model(image[None], output_hidden_states=True)
        assert same(alone.pooler_output[0], packed.pooler_output[i])
        for ours, theirs in zip(states(packed), states(alone), strict=True):
            assert same(ours[i], theirs[0])


@tiny
@pytest.mark.parametrize("precision", [None, "int8"])
@torch.no_grad()
def test_optimize_for_inference(name, precision) -> None:
    fast = internvit.optimize_for_inference(build(name, torch.bfloat16), precision=precision)
    pixels = photos()
    packed = fast(pixels, output_hidden_states=True)
    for i, image in enumerate(pixels):
        alone = fast(image[None], output_hidden_states=True)
        for ours, theirs in zip(states(packed), states(alone), strict=True):
            assert torch.equal(ours[i], theirs[0])


def gradients(model: nn.Module, losses: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@tiny
@pytest.mark.parametrize("checkpointing", ["none", "selective", "block"])
def test_gradients_of_all_parameters(name, checkpointing) -> None:
    """In float64 those of the images one by one; in float32 by the kernels, close to them."""
    wide = build(name, torch.float64).train()
    pixels = [p.double().requires_grad_() for p in photos()]
    targets = [torch.randn_like(wide(p[None]).last_hidden_state[0]) for p in pixels]
    truth = gradients(
        wide, [(wide(p[None]).last_hidden_state[0] * t).sum() for p, t in zip(pixels, targets, strict=True)]
    )
    of_pixels = [p.grad.clone() for p in pixels]
    for p in pixels:
        p.grad = None
    wide.set_gradient_checkpointing(checkpointing)
    actual = gradients(wide, [(f * t).sum() for f, t in zip(wide(pixels).last_hidden_state, targets, strict=True)])
    assert actual.keys() == truth.keys()
    for n, grad in truth.items():
        torch.testing.assert_close(actual[n], grad, rtol=1e-9, atol=1e-9)
    for p, expected in zip(pixels, of_pixels, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-9)
    narrow = copy.deepcopy(wide).float()
    features = narrow([p.detach().float() for p in pixels]).last_hidden_state
    actual = gradients(narrow, [(f * t.float()).sum() for f, t in zip(features, targets, strict=True)])
    assert max(relative_error(actual[n], g) for n, g in truth.items()) < 2e-4


def test_drop_path_drops_whole_images(monkeypatch) -> None:
    model, pixels = build("tiny-rms_norm", torch.float64, drop_path_rate=0.5).train(), photos(torch.float64)
    drawn: list[Tensor] = []

    def draw(batch: int, rate: float, device: torch.device) -> Tensor:
        drawn.append((torch.rand(batch) < 0.5).double() / (1 - rate))
        return drawn[-1]

    monkeypatch.setattr("internvit.model.block.drop_path_scale", draw)
    packed = model(pixels).last_hidden_state
    assert all(len(factors) == len(pixels) for factors in drawn)
    for i, image in enumerate(pixels):
        of_image = iter([factors[i : i + 1] for factors in drawn])
        monkeypatch.setattr("internvit.model.block.drop_path_scale", lambda *_, f=of_image: next(f))
        torch.testing.assert_close(packed[i], model(image[None]).last_hidden_state[0])


@tiny
@pytest.mark.parametrize("packed_in_blocks", [False, True])
def test_attention_maps_and_intermediates(name, packed_in_blocks) -> None:
    model, pixels = build(name), photos()
    bits = {} if packed_in_blocks else {"rtol": 0, "atol": 0}
    with torch.set_grad_enabled(packed_in_blocks):  # without gradients images go through the blocks one by one
        packed = model(pixels, output_attentions=True)
        models = (model, internvit.optimize_for_inference(model))
        rows = [m(pixels, output_attentions="class") for m in models]
        sums = [m(pixels, output_attentions="columns") for m in models]
        last, listed = model.forward_intermediates(pixels, (0, 2), return_prefix_tokens=True)
        for i, image in enumerate(pixels):
            alone = model(image[None], output_attentions=True)
            for ours, theirs in zip(packed.attentions, alone.attentions, strict=True):
                torch.testing.assert_close(ours[i], theirs[0])
            for out in rows:
                for row, theirs in zip(out.attentions, alone.attentions, strict=True):
                    torch.testing.assert_close(row[i], theirs[0, :, 0])
            for out in sums:
                for columns, theirs in zip(out.attentions, alone.attentions, strict=True):
                    torch.testing.assert_close(columns[i], theirs[0].sum(-2))
            one, pairs = model.forward_intermediates(image[None], (0, 2), return_prefix_tokens=True)
            torch.testing.assert_close(last[i], one[0], **bits)
            for (maps, prefix), (map_of_one, prefix_of_one) in zip(listed, pairs, strict=True):
                torch.testing.assert_close(maps[i], map_of_one[0], **bits)
                torch.testing.assert_close(prefix[i], prefix_of_one[0], **bits)


@pytest.mark.parametrize("fpn", [False, True])
def test_backbone_gives_lists_of_maps(fpn) -> None:
    model = build("tiny-rms_norm", num_hidden_layers=4)
    backbone = InternViTBackbone(model.config, out_indices=(0, 1, 2, 3), fpn=fpn, out_dtype=torch.float32).eval()
    pixels = [torch.randn(3, *size) for size in ((56, 56), (28, 42), (56, 28))]
    with torch.no_grad():
        levels = backbone(pixels)
        for i, image in enumerate(pixels):
            for maps, expected in zip(levels, backbone(image[None]), strict=True):
                torch.testing.assert_close(maps[i], expected[0])


def test_modules_with_hooks_and_replaced_ones() -> None:
    """A module that was replaced by one that knows batches alone gets the images one by one, as batches."""

    class Tokens(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) - x.mean(1, keepdim=True)  # mixes the tokens of an image

    model, pixels, seen = build("tiny-rms_norm"), photos(), []
    model.encoder.layers[0].attn = Tokens(model.encoder.layers[0].attn)
    model.encoder.layers[1].attn.register_forward_hook(lambda *_: seen.append("attn"))
    model.encoder.layers[1].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    model.encoder.layers[2] = Tokens(model.encoder.layers[2])
    with torch.no_grad():
        packed = model(pixels).last_hidden_state
        assert set(seen) == {"attn", "mlp"}
        for i, image in enumerate(pixels):
            torch.testing.assert_close(packed[i], model(image[None]).last_hidden_state[0])


def test_compiled_encoder_takes_any_total() -> None:
    model = build("tiny-rms_norm")
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model.encoder.compile(backend=count, fullgraph=True)
    plain = build("tiny-rms_norm")
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        for pixels in (photos(), photos()[1:3], photos()[:4], photos()[1:], photos()[::-1]):
            actual, expected = model(pixels).last_hidden_state, plain(pixels).last_hidden_state
            torch.testing.assert_close(actual.values, expected.values)
    assert len(graphs) <= 2, "the second has a dynamic total, number of images and max_seqlen"


@pytest.mark.sampled(2)
def test_compiles_with_dynamic_shapes_from_the_first_call() -> None:
    """Channels are symbolic too, where they are those of an input."""
    model, plain = build("tiny-rms_norm"), build("tiny-rms_norm")
    plain.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    model.encoder.compile(backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for pixels in (photos(), photos()[1:3]):
            actual, expected = model(pixels).last_hidden_state, plain(pixels).last_hidden_state
            torch.testing.assert_close(actual.values, expected.values)


def test_packed_tokens() -> None:
    values = torch.randn(13, 4)
    packed = PackedTokens(values, [(2, 3), (1, 1), (1, 3)])
    assert packed.lengths == (7, 2, 4)
    assert packed.cu_seqlens.tolist() == [0, 7, 9, 13]
    assert (len(packed), packed.max_seqlen, packed.cu_seqlens.dtype) == (3, 7, torch.int32)
    assert torch.equal(torch.cat(list(packed)), values)
    assert torch.equal(packed[-1], values[9:])
    assert [m.shape for m in packed.maps()] == [(4, 2, 3), (4, 1, 1), (4, 1, 3)]
    assert torch.equal(packed.maps()[2][:, 0, 1], values[11])
    assert torch.equal(packed.class_tokens(), values[[0, 7, 9]])
    padded, there = packed.padded()
    assert padded.shape == (3, 7, 4)
    assert torch.equal(padded[there], values)
    assert packed.to(torch.float64).values.dtype == torch.float64
    with pytest.raises(ValueError, match=r"values must have shape \[13, C\] .* got \[12, 4\]"):
        PackedTokens(values[:12], packed.grids)


@pytest.mark.parametrize(
    ("pixels", "error", "message"),
    [
        ([], ValueError, "expected at least one image, got an empty list"),
        ([torch.zeros(1, 3, 28, 28)], ValueError, r"pixel_values\[0\]: expected \[3, height, width\]"),
        ([torch.zeros(3, 28, 28), torch.zeros(3, 29, 28)], ValueError, "multiples of patch_size=14, got 29x28"),
        ([torch.zeros(4, 28, 28)], ValueError, "expected"),
        ([torch.zeros(3, 28, 28, dtype=torch.uint8)], TypeError, "floating-point"),
        (["image.png"], TypeError, "expected a torch.Tensor"),
    ],
)
def test_bad_images(pixels, error, message) -> None:
    with pytest.raises(error, match=message):
        build("tiny-rms_norm")(pixels)
