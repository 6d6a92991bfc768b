"""`calibrate`: rounding that makes up for its errors, smoothing that changes no bit, and the choice of Linears."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch

import internvit
from internvit.inference import linear_int8
from internvit.inference.calibrate import Calibration, calibrate
from internvit.inference.compare import state_error
from internvit.inference.gptq import BFloat16Grid, Int8Grid, round_weight
from internvit.inference.int8_grid import is_on_grid, quantize_weight, round_rows
from internvit.inference.packed_block import LINEARS
from internvit.inference.smoothing import migrate, smoothing_factors
from tests.cli.test_app import call, photos, weights  # noqa: F401 (fixtures)
from tests.inference.test_optimize import VARIANTS, small_model
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "examples"))

multiplies = pytest.mark.skipif(
    linear_int8.unavailable_reason() is not None, reason=str(linear_int8.unavailable_reason())
)


def correlated(rows: int, depth: int, generator: torch.Generator) -> torch.Tensor:
    """Inputs of which a few directions hold nearly all, as a network's are."""
    few = torch.randn((rows, depth // 8), generator=generator, dtype=torch.float64)
    mix = torch.randn((depth // 8, depth), generator=generator, dtype=torch.float64)
    return few @ mix + 0.05 * torch.randn((rows, depth), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("out", "depth"), [(48, 64), (33, 40), (20, 300), (1, 8)])
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "bfloat16"])
def test_columns_make_up_for_each_others_errors(out: int, depth: int, int8: bool, seed: int) -> None:
    """Judged over some draws where there are few weights: of a row of eight one may lie on the grid by chance."""
    generator = torch.Generator().manual_seed(seed)
    errors = [torch.zeros(()), torch.zeros(())]
    for _ in range(20 if out == 1 else 1):
        weight = torch.randn((out, depth), generator=generator, dtype=torch.float64) / depth**0.5
        x, fresh = correlated(2000, depth, generator).split(1000)
        grid = Int8Grid(weight) if int8 else BFloat16Grid()
        nearest = torch.stack([grid.nearest(weight[:, i], i) for i in range(depth)], 1)
        rounded = round_weight(weight, x.T @ x / len(x), grid)
        for total, w in zip(errors, (rounded, nearest), strict=True):
            total += ((w - weight) @ fresh.T).square().sum()
        if int8:
            assert is_on_grid(rounded.bfloat16()) or depth < 16
            weight_q, scale = quantize_weight(rounded.bfloat16())
            assert torch.allclose(weight_q.double() * scale.double().unsqueeze(1), rounded, rtol=1e-6)
            assert (weight_q.abs().amax(1) == 127).all()
    assert errors[0] < 0.5 * errors[1], "on inputs that it has not seen"


def test_rows_of_zeros_and_inputs_that_never_vary() -> None:
    weight = torch.randn(6, 16, dtype=torch.float64)
    weight[2] = 0
    moments = torch.zeros(16, 16, dtype=torch.float64)
    for grid in (Int8Grid(weight), BFloat16Grid()):
        rounded = round_weight(weight, moments, grid)
        assert rounded.isfinite().all()
        assert (rounded[2] == 0).all()
        assert (rounded - weight).abs().max() < 0.02


@pytest.mark.parametrize("variant", VARIANTS)
def test_moving_outliers_changes_no_bit(variant: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = small_model(variant, torch.bfloat16, seed)
    before, layer = copy.deepcopy(model), model.encoder.layers[1]
    for name in LINEARS[:3]:
        depth = layer.get_submodule(name).in_features
        migrate(layer, name, torch.randint(-3, 4, (depth,)).float().exp2())
        assert not torch.equal(layer.get_submodule(name).weight, before.encoder.layers[1].get_submodule(name).weight)
    pixels = torch.randn(1, 3, 112, 112).bfloat16()
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, before(pixels).last_hidden_state)
    with pytest.raises(ValueError, match=r"name must be attn.qkv, attn.proj or mlp.fc1, got 'mlp.fc2'"):
        migrate(layer, "mlp.fc2", torch.ones(1))


def test_outlier_channels_are_moved(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn((400, 96), generator=generator), torch.randn((64, 96), generator=generator)
    x[:, [3, 50]] *= 100.0
    factors = smoothing_factors(x, x.abs().amax(0), weight)
    assert torch.equal(factors.log2(), factors.log2().round())
    assert factors[[3, 50]].min() > 4 * factors.median()

    def error(factors: torch.Tensor) -> float:
        weight_q, scale = quantize_weight(weight * factors)
        y = round_rows(x / factors) @ (weight_q.float() * scale.unsqueeze(1)).T
        return (y - x @ weight.T).norm().item()

    assert error(factors) < 0.5 * error(torch.ones(96))


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn((1, 3, 112, 112), generator=generator) for _ in range(8)]


def errors_of(model: internvit.InternViT, exact: internvit.InternViT, images, **settings: object) -> list[float]:
    fast = internvit.optimize_for_inference(model, out_dtype=torch.float32, **settings)
    with torch.no_grad():
        return [state_error([fast(x)[0]], [exact(x)[0]]).channel for x in images]


@pytest.mark.sampled(2)
@multiplies
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_calibrated_model(variant: str, images, tmp_path) -> None:
    model = small_model(variant, torch.float32, 0)
    before = copy.deepcopy(model.state_dict())
    made = calibrate(model, images[:5], images[5:7], target=1.0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (made.skipped, made.share) == ([], 1.0)
    plain = copy.deepcopy(model).bfloat16()
    unseen = images[7:]
    nearest = errors_of(plain, model, unseen, precision="int8", skip=())
    assert errors_of(made.model, model, unseen, precision="int8")[0] < nearest[0]
    assert made.errors == pytest.approx(errors_of(made.model, model, images[5:7], precision="int8"))
    assert made.everywhere == made.errors
    assert max(made.bfloat16) < max(made.errors)
    fast = internvit.optimize_for_inference(made.model, precision="int8")
    assert len(fast.int8) == 12, "not every Linear is on the grid"
    fast.save_pretrained(tmp_path)
    loaded = internvit.optimize_for_inference(internvit.InternViT.from_pretrained(tmp_path), precision="int8")
    assert torch.equal(loaded(images[7].bfloat16())[0], fast(images[7].bfloat16())[0])


@pytest.mark.sampled(2)
@multiplies
def test_the_worst_linears_stay_bfloat16_until_the_target_is_met(images) -> None:
    model = small_model(VARIANTS[0], torch.float32, 0)
    with torch.no_grad():  # one channel of a thousand times the size leaves int8 no room for the others
        model.encoder.layers[1].mlp.fc1.weight[5] *= 1000.0
        model.encoder.layers[1].mlp.fc1.bias[5] = 300.0
        model.encoder.layers[1].mlp.fc2.weight[:, 5] /= 1000.0
    everything = calibrate(model, images[:5], images[5:7], target=10.0)
    assert max(everything.alone, key=everything.alone.get) == "encoder.layers.1.mlp.fc2"
    target = 0.5 * (max(everything.everywhere) + max(everything.bfloat16))
    made = calibrate(model, images[:5], images[5:7], target=target)
    assert made.skipped[0] == "encoder.layers.1.mlp.fc2"
    assert max(made.errors) <= target < max(made.everywhere)
    assert 0 < made.share < 1
    fast = internvit.optimize_for_inference(made.model, precision="int8")
    assert fast.int8 == made.alone.keys() - set(made.skipped), "what is not int8 is not told by the weights"


@multiplies
def test_a_target_that_bfloat16_misses_is_logged(images, caplog) -> None:
    made = calibrate(small_model(VARIANTS[0], torch.float32, 0), images[:1], images[5:6], target=1e-6)
    assert len(made.skipped) == 12
    assert "more than the target" in caplog.text


def test_wrong_arguments_are_clear_errors(images, monkeypatch) -> None:
    model = small_model(VARIANTS[0], torch.float32, 0)
    for bad, message in (
        ((torch.nn.Linear(1, 1), images, images), "model must be an InternViT, got Linear"),
        ((copy.deepcopy(model).bfloat16(), images, images), "float32 on a CPU in eval mode, got torch.bfloat16"),
        ((copy.deepcopy(model).train(), images, images), "in training"),
        ((model, [], images), "expected images and others held out, got 0 images and 8 held out"),
        ((model, images, []), "got 8 images and 0 held out"),
        ((model, images, images, float("nan")), "target must be a positive number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(*bad)
    monkeypatch.setattr(linear_int8, "unavailable_reason", lambda: "int8 Linears need a CPU")
    with pytest.raises(RuntimeError, match="nothing can be measured: int8 Linears need a CPU"):
        calibrate(model, images, images)
    model.encoder.layers[2].attn.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers \[2\] have hooks, adapters or replaced parts"):
        calibrate(model, images, images)


@multiplies
def test_the_command(weights: Path, photos: Path, tmp_path, capsys) -> None:  # noqa: F811
    arguments = ["calibrate", photos, "--weights", weights, "--out", tmp_path / "int8", "--target", "5"]
    printed, _ = call(capsys, *arguments)
    assert "12 of 12 Linears in int8, 100% of their weights" in printed
    entry = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert entry["format"] == "int-quantized"
    assert "holds weights" in call(capsys, *arguments, code=2)[1]
    printed, _ = call(capsys, *arguments, "--overwrite", "--json")
    result = json.loads(printed)
    assert result["skipped"] == []
    assert [Path(p).name for p in result["held_out"]] == ["1.png", "5.png"]
    one = call(capsys, *arguments[:1], photos / "0.png", *arguments[2:5], tmp_path / "other", code=2)[1]
    assert "expected at least 2, of which one is held out, got 1" in one
    assert isinstance(Calibration.share, property)


@multiplies
def test_a_target_without_any_int8_linear_writes_nothing(weights: Path, photos: Path, tmp_path, capsys) -> None:  # noqa: F811
    """A checkpoint with bfloat16 Linears alone says nothing: `--precision int8` took its own choice of them."""
    out = tmp_path / "int8"
    _, stderr = call(capsys, "calibrate", photos, "--weights", weights, "--out", out, "--target", "0.0001", code=2)
    assert "no Linear can be int8 within 0.0001 %, bfloat16 alone is off by" in " ".join(stderr.split())
    assert not out.exists()


@multiplies
@pytest.mark.slow
def test_a_trained_network_within_one_and_a_half_percent() -> None:
    """docs/numerics.md has the errors: the three photographs are neither rounded by nor held out."""
    import calibrate_vit_s as example

    network, made = example.calibrated()
    fast = internvit.optimize_for_inference(made.model, out_dtype=torch.float32, precision="int8")
    assert fast.int8 == made.alone.keys() - set(made.skipped)
    for name, error in example.errors(network, fast).items():
        print(f"{name}: {error:.2%} with {made.share:.0%} of the Linears' weights in int8")
        assert error <= 0.015
