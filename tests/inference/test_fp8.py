"""`optimize_for_inference(precision="fp8")`: what it computes, on the reference backend, and where it is refused."""

import pytest
import torch

import internvit
from internvit.inference import fp8
from internvit.inference.fp8 import Fp8Linear
from internvit.numerics import relative_error
from tests.inference.test_optimize import VARIANTS, small_model, truth_of


def test_a_cpu_and_an_old_gpu_are_clear_errors(monkeypatch) -> None:
    model = small_model(VARIANTS[0], torch.bfloat16, 0)
    with pytest.raises(ValueError, match=r"precision='fp8' needs a model on a CUDA device of .* 8.9 .*got cpu"):
        internvit.optimize_for_inference(model, precision="fp8")
    with pytest.raises(ValueError, match=r"precision='fp8' needs a bfloat16 model, got torch.float32"):
        internvit.optimize_for_inference(small_model(VARIANTS[0], torch.float32, 0), precision="fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert str(fp8.unavailable_reason(torch.device("cuda"))).endswith("got 8.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.unavailable_reason(torch.device("cuda")) is None


@pytest.mark.parametrize("gelu", [False, True])
def test_a_linear_errs_as_float64_with_its_operands_rounded(gelu: bool, generator) -> None:
    linear = torch.nn.Linear(256, 96).bfloat16()
    x, gamma = torch.randn((3, 70, 256), generator=generator).bfloat16(), torch.randn(96, generator=generator)

    def nearest(t: torch.Tensor) -> torch.Tensor:
        scale = t.double().abs().amax(-1, keepdim=True) / 448
        return (t.double() / scale).to(torch.float8_e4m3fn).double() * scale

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x.double(), weight.double(), linear.bias.double()) * gamma.double()
        return torch.nn.functional.gelu(y) if gelu else y

    truth = product(x, linear.weight)
    emulated = product(nearest(x), nearest(linear.weight)).bfloat16()
    y = Fp8Linear(linear, gamma)(x, gelu)
    assert relative_error(y, truth) <= 1.1 * relative_error(emulated, truth)


@pytest.mark.parametrize("variant", VARIANTS)
def test_features_of_a_small_model(variant: str, monkeypatch) -> None:
    monkeypatch.setattr(fp8, "unavailable_reason", lambda device: None)
    model = small_model(variant, torch.bfloat16, 0)
    pixels = torch.randn(1, 3, 112, 112).bfloat16()
    truth = truth_of(model, pixels)
    fast = internvit.optimize_for_inference(model, precision="fp8", skip=["*.mlp.fc2"])
    assert "9 Linears in float8" in repr(fast)
    plain = relative_error(internvit.optimize_for_inference(model)(pixels).last_hidden_state, truth)
    error = relative_error(fast(pixels).last_hidden_state, truth)
    assert plain < error < 0.05
    every = internvit.optimize_for_inference(model, precision="fp8", skip=())
    assert error < relative_error(every(pixels).last_hidden_state, truth) < 0.05
    before = fast(pixels).last_hidden_state
    model.encoder.layers[1].attn.proj.weight.data.neg_()
    assert relative_error(fast(pixels).last_hidden_state, before) > 0.05, "the weights are read at each call"
    model.encoder.layers[2].attn.register_forward_hook(lambda *_: None)
    assert fast(pixels).last_hidden_state.isfinite().all()
