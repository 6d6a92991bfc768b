"""forward_intermediates against timm's own, with the same weights."""

import inspect

import pytest
import torch
from torch import Tensor

from internvit import InternViT
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, images, random_weights, timm_judge

pytest.importorskip("timm", reason="the timm extra is not installed")
CONFIG = CONFIGS["tiny-layer_norm"].replace(num_hidden_layers=5, drop_path_rate=0.0)


@pytest.fixture(scope="module")
def pair() -> tuple[InternViT, torch.nn.Module]:
    torch.manual_seed(0)
    model = InternViT(CONFIG).eval()
    random_weights(model)
    return model, timm_judge(CONFIG, model.state_dict())


def same(ours, theirs) -> None:
    """The same nest of lists, tuples and dicts, with the same tensors in it."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs.double()) <= 1e-5
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            same(ours[key], theirs[key])
    else:
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"indices": 2},
        {"indices": [0, -2]},
        {"indices": [3, 1]},
        {"indices": (1, 2), "stop_early": True},
        {"indices": 3, "return_prefix_tokens": True},
        {"indices": [1], "output_fmt": "NLC", "norm": True},
        {"indices": [1, 4], "intermediates_only": True},
        {"indices": [1, 4], "intermediates_only": True, "return_prefix_tokens": True},
        {"indices": [2], "output_dict": True, "return_prefix_tokens": True, "stop_early": True},
        {"indices": [2], "output_dict": True, "intermediates_only": True},
    ],
    ids=str,
)
@torch.no_grad()
def test_results_are_timms(pair, settings) -> None:
    model, judge = pair
    pixels = images(CONFIG, 2)
    same(model.forward_intermediates(pixels, **settings), judge.forward_intermediates(pixels, **settings))


@torch.no_grad()
def test_other_sizes_have_their_own_grid(pair) -> None:
    maps = pair[0].forward_intermediates(torch.randn(1, 3, 42, 98), 1, intermediates_only=True)
    assert [x.shape for x in maps] == [(1, 96, 3, 7)]


def test_stop_early_runs_no_further_block(pair) -> None:
    model, _ = pair
    ran: list[int] = []
    hooks = [x.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, x in enumerate(model.encoder.layers)]
    with torch.no_grad():
        model.forward_intermediates(images(CONFIG, 1), [0, 2], stop_early=True)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2]


def test_the_arguments_are_timms(pair) -> None:
    from internvit.model.feature_maps import forward_intermediates

    ours = list(inspect.signature(forward_intermediates).parameters)[1:]
    theirs = list(inspect.signature(pair[1].forward_intermediates).parameters)
    assert ours == [name for name in theirs if name not in ("attn_mask", "is_causal")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output_fmt": "NHWC"}, "output_fmt: expected one of NCHW, NLC, got 'NHWC'"),
        ({"indices": 6}, "indices: expected the last 1 to 5 blocks, got 6"),
        ({"indices": [5]}, r"indices: expected numbers of blocks from -5 to 4, got \(5,\)"),
        ({"indices": []}, "indices: expected numbers"),
    ],
)
def test_bad_arguments(pair, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        pair[0].forward_intermediates(images(CONFIG, 1), **settings)
