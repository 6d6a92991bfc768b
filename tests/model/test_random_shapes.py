"""Whole models on random architectures and image sizes: an image alone, in a batch, at another place, in any layout."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import internvit
from internvit import InternViT, InternViTConfig
from internvit.numerics import relative_error
from internvit.ops.backends import native
from tests.support.layouts import laid_out
from tests.support.models import opengvlab_judge, random_weights

MISSING = native.unavailable_reason("internvit_cpu")
BATCH = 5
PIXEL_LAYOUTS = ("contiguous", "channels_last", "every_second", "batch_inside", "expanded", "offset")
KINDS = ("eval", "optimized", "patched")


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@st.composite
def architectures(draw: st.DrawFn) -> InternViTConfig:
    heads, patch = draw(st.integers(1, 3)), draw(st.sampled_from([4, 7, 14]))
    side = st.integers(1, 6).map(lambda n: n * patch)
    return InternViTConfig(
        patch_size=patch,
        image_size=draw(st.one_of(st.just((10 * patch, patch)), st.tuples(side, side))),
        hidden_size=heads * draw(st.one_of(st.sampled_from([8, 16, 64]), st.integers(1, 40))),
        num_hidden_layers=2,
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 300)),
        norm_type=draw(st.sampled_from(["rms_norm", "layer_norm"])),
        qkv_bias=draw(st.booleans()),
        qk_normalization=draw(st.booleans()),
    )


PROBLEMS = given(
    config=architectures(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=st.sampled_from(PIXEL_LAYOUTS),
    seed=st.integers(0, 2**31),
)


def problems(examples: int) -> Callable[[Callable], Callable]:
    """Runs a test on `examples` random models and pixels of each kind, without gradients."""
    several = settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    return lambda test: pytest.mark.parametrize("kind", KINDS)(several(PROBLEMS(torch.no_grad()(test))))


def make(
    kind: str, config: InternViTConfig, dtype: torch.dtype, layout: str, seed: int
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A model's tokens as a function of pixels, and pixels [5, 3, H, W]."""
    torch.manual_seed(seed)
    model = InternViT(config).eval()
    random_weights(model)
    pixels = torch.randn(BATCH, 3, *config.image_hw).to(dtype)
    if layout == "channels_last":
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    else:
        pixels = laid_out(pixels, layout)
    if kind == "patched":
        model = opengvlab_judge(config, model.state_dict()).to(dtype)
        internvit.patch(model)
    elif kind == "optimized":
        model = internvit.optimize_for_inference(model.to(dtype))
    else:
        model = model.to(dtype)
    return lambda x: model(x).last_hidden_state, pixels


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@problems(8)
def test_an_image_alone_in_a_batch_and_at_another_place(kind, **problem) -> None:
    tokens, pixels = make(kind, **problem)
    whole = tokens(pixels)
    assert torch.equal(tokens(pixels), whole)
    for order in (slice(0, 1), slice(2, 3), slice(1, 3), [3], [4, 0, 3, 1, 2]):
        assert torch.equal(tokens(pixels[order]), whole[order])


@problems(4)
def test_threads_and_pytorchs_kernels_within_rounding(kind, **problem) -> None:
    """MKL sums float32 products in another order for another number of threads: 10 x 1 patches of width 288 do."""
    tokens, pixels = make(kind, **problem)
    torch.set_num_threads(1)
    expected = tokens(pixels)
    bound = 1e-5 if problem["dtype"] == torch.float32 else 4 * torch.finfo(problem["dtype"]).eps
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert relative_error(tokens(pixels), expected) < bound
    for backend in ("reference", "sdpa"):
        with internvit.backend(backend):
            together = tokens(pixels)
            assert relative_error(tokens(pixels[2:3]), together[2:3]) < bound
