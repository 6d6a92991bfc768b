"""Hooks of all modules, forwards that classes get later, layers compiled one by one: they run, although modules are
not called otherwise."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.modules import module as nn_module
from torch.utils.flop_counter import FlopCounterMode

import internvit
from internvit.inference.calibrate import calibrate
from internvit.inference.int8_grid import dequantize_weight, quantize_weight
from internvit.inference.precision import quantised_linears
from internvit.model import hooks
from internvit.numerics import relative_error
from tests.support.models import images, pair

REGISTER = {
    "forward": nn_module.register_module_forward_hook,
    "pre-forward": nn_module.register_module_forward_pre_hook,
    "backward": nn_module.register_module_full_backward_hook,
    "pre-backward": nn_module.register_module_full_backward_pre_hook,
}


@contextlib.contextmanager
def called(kind: str) -> Iterator[list[nn.Module]]:
    seen: list[nn.Module] = []
    handle = REGISTER[kind](lambda module, *_: seen.append(module))
    try:
        yield seen
    finally:
        handle.remove()


def names(model: nn.Module, seen: list[nn.Module]) -> set[str]:
    return {name for name, module in model.named_modules() if any(module is one for one in seen)}


def doors(name: str) -> tuple[nn.Module, dict[str, nn.Module], Tensor]:
    model, reference = pair(name)
    pixels = images(model.config, 2).requires_grad_()
    return reference, {"internvit": model, "optimised": internvit.optimize_for_inference(model)}, pixels


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])
def test_they_see_every_module_that_the_reference_calls(name, kind) -> None:
    reference, models, pixels = doors(name)
    backward = "backward" in kind
    with called(kind) as seen:
        out = reference(pixels).last_hidden_state
        if backward:
            out.square().mean().backward()
    expected = names(reference, seen)
    assert {"encoder.layers.1.attn.qkv", "encoder.layers.2.norm2"} < expected
    for door, model in models.items():
        if backward and door == "optimised":
            continue  # it has no gradients
        inner = getattr(model, "model", model)
        before = model(pixels).last_hidden_state
        with called(kind) as seen:
            during = model(pixels).last_hidden_state
            if backward:
                during.square().mean().backward()
        assert expected <= names(inner, seen), door
        assert relative_error(during, before) < 1e-6, door  # QK-norm is part of attention, and rounds otherwise there
        assert torch.equal(model(pixels).last_hidden_state, before), door


@pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])
def test_a_forward_that_a_class_gets_later_runs(name, monkeypatch) -> None:
    """Of every class in the model that a fused pass stands for."""
    _, models, pixels = doors(name)
    classes = {type(module) for module in models["internvit"].modules()} & hooks._FORWARDS.keys()
    assert {nn.Linear, internvit.InternViT} < classes
    assert len(classes) == 8
    for door, model in models.items():
        expected = model(pixels).last_hidden_state
        for module_class in classes:
            ran: list[type] = []
            own = module_class.forward

            def forward(self, *args, ran=ran, own=own, **kwargs):  # type: ignore[no-untyped-def]
                ran.append(type(self))
                return own(self, *args, **kwargs)

            with monkeypatch.context() as other:
                other.setattr(module_class, "forward", forward)
                during = model(pixels).last_hidden_state
            assert ran, (door, module_class)
            assert relative_error(during, expected) < 1e-6
        assert torch.equal(model(pixels).last_hidden_state, expected)


@pytest.mark.sampled(2)
def test_a_forward_of_pytorchs_that_was_another_before() -> None:
    """A process that replaces one before it imports the library."""
    code = """
import torch
own, ran = torch.nn.Linear.forward, []
def forward(self, x):
    ran.append(1)
    return own(self, x)
torch.nn.Linear.forward = forward
import internvit
config = internvit.InternViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64)
model = internvit.InternViT(config).eval()
model(torch.zeros(1, 3, 28, 28))
internvit.optimize_for_inference(model)(torch.zeros(1, 3, 28, 28))
assert len(ran) == 8, ran
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_setting_up_beside_them() -> None:
    """They would not be there later: what is stored does not depend on them, and what measures by calls refuses."""
    model, _ = pair("tiny-layer_norm")
    model = model.bfloat16()
    linear = model.encoder.layers[0].mlp.fc1
    with torch.no_grad():
        linear.weight.copy_(dequantize_weight(*quantize_weight(linear.weight), torch.bfloat16))
    expected = quantised_linears(model, "int8", None)
    with called("forward"):
        assert quantised_linears(model, "int8", None) == expected == {"encoder.layers.0.mlp.fc1"}
        with pytest.raises(ValueError, match="calibrate: hooks of all modules are registered"):
            calibrate(model.float(), [], [])


def test_counting_does_not_change_what_runs() -> None:
    """The hooks follow modules and read nothing; the fused ops have formulas of their own."""
    _, models, pixels = doors("tiny-layer_norm")
    for door, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(pixels)
        assert counter.get_total_flops() > 0
        assert not [name for name in counter.get_flop_counts() if name.endswith(("qkv", "fc1"))], door
        with CommDebugMode():
            assert not hooks.has_global_hooks()


def test_layers_that_were_compiled_one_by_one_run_compiled() -> None:
    _, models, pixels = doors("tiny-layer_norm")
    model = models["internvit"]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        for layer in model.encoder.layers:
            layer.compile(backend=backend)
        torch.testing.assert_close(model(pixels).last_hidden_state, expected)
    assert graphs
