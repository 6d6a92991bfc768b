"""Embeddings of another native image or patch size, against Keys' cubic written out here, and timm's."""

import math

import pytest
import torch
from torch import Tensor

import internvit
from internvit import InternViT, InternViTBackbone, InternViTConfig, reference
from internvit.checkpoint.resample import resample_patch_embedding, resize_embeddings
from tests.support.models import random_weights

CONFIG = InternViTConfig(
    image_size=56, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)


def cubic_matrix(old: int, new: int) -> Tensor:
    """[new, old]: Keys' cubic convolution with a = -0.75 at pixel centres, edges repeated; float64."""

    def weight(t: float) -> float:
        a, t = -0.75, abs(t)
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = torch.zeros(new, old, dtype=torch.float64)
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[i, min(max(j, 0), old - 1)] += weight(centre - j)
    return matrix


@pytest.fixture
def folder(tmp_path):
    model = InternViT(CONFIG)
    random_weights(model)
    model.save_pretrained(tmp_path)
    return tmp_path, model


def test_patch_14_to_16_at_load_is_upstreams(folder) -> None:
    path, source = folder
    loaded = InternViT.from_pretrained(path, patch_size=16, image_size=(96, 128))
    assert loaded.config == loaded.embeddings.config == CONFIG.replace(patch_size=16, image_size=(96, 128))
    up = cubic_matrix(14, 16)
    weight = source.embeddings.patch_embedding.weight.detach().double()
    torch.testing.assert_close(
        loaded.embeddings.patch_embedding.weight.double(), up @ weight @ up.T, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(loaded.embeddings.patch_embedding.bias, source.embeddings.patch_embedding.bias)
    position = source.embeddings.position_embedding.detach().double()
    grid = position[0, 1:].view(4, 4, 32)
    rows, columns = cubic_matrix(4, 6), cubic_matrix(4, 8)
    expected = torch.einsum("ri,sj,ijc->rsc", rows, columns, grid).reshape(48, 32)
    torch.testing.assert_close(loaded.embeddings.position_embedding[0, 1:].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(loaded.embeddings.position_embedding[:, 0], source.embeddings.position_embedding[:, 0])
    for (name, a), (other, b) in zip(loaded.encoder.named_parameters(), source.encoder.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert loaded(torch.randn(1, 3, 96, 128)).last_hidden_state.shape == (1, 49, 32)
    assert loaded(torch.randn(1, 3, 32, 48)).last_hidden_state.shape == (1, 7, 32)  # and any size at run time


def test_patch_size_alone_keeps_the_grid(folder) -> None:
    path, source = folder
    loaded = InternViT.from_pretrained(path, patch_size=16, dtype=torch.bfloat16)
    assert loaded.config.image_size == 64
    assert loaded.embeddings.patch_embedding.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.embeddings.position_embedding, source.embeddings.position_embedding.bfloat16())


def test_image_size_at_load_is_the_resizing_at_run_time(folder) -> None:
    path, source = folder
    pixels = torch.randn(2, 3, 84, 70)
    at_load = InternViT.from_pretrained(path, image_size=(84, 70))
    with torch.no_grad():
        assert torch.equal(at_load(pixels).last_hidden_state, source.eval()(pixels).last_hidden_state)
    same = InternViT.from_pretrained(path, image_size=56)
    assert same.config == source.config
    assert torch.equal(same.embeddings.position_embedding, source.embeddings.position_embedding)


def test_static_position_embeddings_are_resized_at_load(tmp_path) -> None:
    InternViT(CONFIG.replace(pos_embed_mode="static")).save_pretrained(tmp_path)
    loaded = InternViT.from_pretrained(tmp_path, image_size=84)
    assert loaded(torch.randn(1, 3, 84, 84)).last_hidden_state.shape == (1, 37, 32)
    with pytest.raises(ValueError, match="never resizes"):
        loaded(torch.randn(1, 3, 56, 56))


@pytest.mark.parametrize("size", [8, 16, 20])
def test_pi_resize_is_timms(size) -> None:
    timm = pytest.importorskip("timm.layers", reason="the timm extra is not installed")
    weight = torch.randn(8, 3, 14, 14)
    expected = timm.resample_patch_embed(weight, [size, size])
    torch.testing.assert_close(resample_patch_embedding(weight, size, "pi"), expected, rtol=1e-3, atol=1e-4)


def test_pi_resize_gives_an_enlarged_picture_its_tokens(folder) -> None:
    path, source = folder
    pixels = torch.randn(1, 3, 56, 56)
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14).flatten(0, 3)[:, None]  # each patch on its own
    large = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bicubic", antialias=True)
    large = large.view(1, 3, 4, 4, 16, 16).permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 64, 64)
    expected = source.embeddings.patch_embedding(pixels)
    loaded = InternViT.from_pretrained(path, patch_size=16, patch_resampling="pi")
    torch.testing.assert_close(loaded.embeddings.patch_embedding(large), expected, rtol=1e-3, atol=1e-4)


def test_backbone_and_reference_take_the_same_arguments(folder) -> None:
    path, _ = folder
    backbone = InternViTBackbone.from_pretrained(path, (0, 1), patch_size=16, image_size=64)
    pixels = torch.randn(1, 3, 64, 96)
    assert [x.shape for x in backbone(pixels)] == [(1, 32, 4, 6)] * 2
    assert backbone.strides == (16.0, 16.0)
    plain = internvit.checkpoint.load.load_pretrained(reference.InternViT, path, patch_size=16, image_size=64)
    model = InternViT.from_pretrained(path, patch_size=16, image_size=64)
    out = model(pixels).last_hidden_state
    torch.testing.assert_close(out, plain(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)
    model.save_pretrained(path / "resized")
    assert torch.equal(InternViT.from_pretrained(path / "resized")(pixels).last_hidden_state, out)


def test_bad_arguments(folder) -> None:
    path, model = folder
    with pytest.raises(ValueError, match="patch_resampling: expected one of bicubic, pi, got 'nearest'"):
        InternViT.from_pretrained(path, patch_size=16, patch_resampling="nearest")
    with pytest.raises(ValueError, match="patch_size: expected a positive int, got 0"):
        resize_embeddings(model, patch_size=0)
    with pytest.raises(ValueError, match="image_size must be one or two positive multiples of patch_size=16, got 56"):
        InternViT.from_pretrained(path, patch_size=16, image_size=56)
    with pytest.raises(ValueError, match=r"weight: expected \[C, channels, p, p\], got \[4, 3, 14, 16\]"):
        resample_patch_embedding(torch.randn(4, 3, 14, 16), 8)
