"""`compare_precisions` and `internvit precision`: errors are those of the optimised models, block by block."""

import json
from pathlib import Path

import pytest
import torch

import internvit
from internvit.images import load_pixels
from internvit.inference import linear_int8
from internvit.inference.compare import compare_precisions
from internvit.numerics import relative_error
from tests.cli.test_app import call, photos, weights  # noqa: F401 (fixtures)
from tests.inference.test_optimize import VARIANTS, small_model

pytestmark = pytest.mark.skipif(
    linear_int8.unavailable_reason() is not None, reason=str(linear_int8.unavailable_reason())
)


def test_errors_are_those_of_the_optimised_models() -> None:
    model = small_model(VARIANTS[0], torch.float32, 0)
    images = [torch.randn(1, 3, 112, 112) for _ in range(2)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    skip = ["encoder.layers.1", "*.proj"]
    report = compare_precisions(model, images, skip)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    half = internvit.InternViT(model.config).eval()
    half.load_state_dict(before)
    half.bfloat16()
    with torch.no_grad():
        truth = [model(x, output_hidden_states=True).hidden_states for x in images]

    def outputs(**settings: object) -> list[tuple]:
        fast = internvit.optimize_for_inference(half, out_dtype=torch.float32, **settings)
        return [fast(x, output_hidden_states=True).hidden_states for x in images]

    plain = outputs()
    for errors, settings in ((report.bfloat16, {}), (report.int8, {"precision": "int8", "skip": skip})):
        ours = outputs(**settings)
        assert len(errors) == 4
        for i, error in enumerate(errors):
            actual, expected = (torch.cat([states[i] for states in every]) for every in (ours, truth))
            assert error.relative == pytest.approx(relative_error(actual, expected))
            channels = (actual - expected).double().square().sum((0, 1)) / expected.double().square().sum((0, 1))
            assert error.channel == pytest.approx(channels.sqrt().median().item())
            assert error.cosine == pytest.approx(torch.cosine_similarity(actual, expected, dim=-1).min().item())
    assert report.skipped == [
        *("encoder.layers.0.attn.proj", "encoder.layers.1.attn.qkv", "encoder.layers.1.attn.proj"),
        *("encoder.layers.1.mlp.fc1", "encoder.layers.1.mlp.fc2", "encoder.layers.2.attn.proj"),
    ]
    alone = outputs(precision="int8", skip=["encoder.layers.0", "encoder.layers.1"])
    actual, expected = (torch.cat([states[-1] for states in every]).double() for every in (alone, plain))
    channels = (actual - expected).square().sum((0, 1)) / expected.square().sum((0, 1))
    assert report.alone[2] == pytest.approx(channels.sqrt().median().item())


def test_a_block_that_int8_spoils_is_named() -> None:
    model = small_model(VARIANTS[0], torch.float32, 0)
    with torch.no_grad():  # one channel of a thousand times the size leaves int8 no room for the others
        model.encoder.layers[1].norm2.weight[5] = 1000.0
        model.encoder.layers[1].mlp.fc1.weight[:, 5] /= 1000.0
    report = compare_precisions(model, [torch.randn(1, 3, 112, 112)], skip=())
    assert report.alone[1] > 5 * max(report.alone[0], report.alone[2])


def test_wrong_arguments_are_clear_errors() -> None:
    with pytest.raises(ValueError, match=r"model must be float32, got torch\.bfloat16"):
        compare_precisions(small_model(VARIANTS[0], torch.bfloat16, 0), [])
    with pytest.raises(ValueError, match="images must have at least one, got none"):
        compare_precisions(small_model(VARIANTS[0], torch.float32, 0), [])


def test_the_command(weights: Path, photos: Path, capsys) -> None:  # noqa: F811
    arguments = ["precision", photos, "--weights", weights, "--skip", "encoder.layers.2"]
    printed = json.loads(call(capsys, *arguments, "--json")[0])
    model = internvit.InternViT.from_pretrained(weights)
    images = [load_pixels(path, (56, 56))[None] for path in sorted(photos.iterdir())]
    report = compare_precisions(model, images, ["encoder.layers.2"])
    assert [e["relative"] for e in printed["int8"]] == pytest.approx([e.relative for e in report.int8])
    assert printed["skipped"] == report.skipped
    table, _ = call(capsys, *arguments)
    assert "6 images at 56x56, against float32" in table
    assert f"{report.int8[-1].relative:.2%}" in table
    assert "in bfloat16: encoder.layers.2.attn.qkv" in table
    assert "names none" in call(capsys, *arguments[:-1], "encoder.layers.9", code=2)[1]
    assert "Example" in call(capsys, "precision", "--help")[0]
    assert "name the network" in call(capsys, "precision", photos, code=2)[1]
