"""What a block leaves for backward, counted by live storages, and that recipes change no bit of any gradient."""

import contextlib
import gc

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from internvit import InternViT
from internvit.modeling import InternViTLayer
from internvit.ops import recompute
from tests.judges import CONFIGS, images, random_weights

blocks = pytest.mark.parametrize("name", ["300m-2-layers", "6b-2-layers"])


def block(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[InternViTLayer, Tensor]:
    config = CONFIGS[name]
    layer = InternViTLayer(config, dtype=dtype)
    random_weights(layer)
    return layer, torch.randn(1, config.num_tokens, config.hidden_size, dtype=dtype).requires_grad_()


class LiveStorages(TorchDispatchMode):
    """The storages that ops made while active and that something still holds, a module's parameters apart."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata in self.parameters:
                    continue
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(n for reference, n in self.made.values() if not reference.expired())


def saved_units(layer: InternViTLayer, x: Tensor) -> float:
    """Units of one [N, C] tensor alive between forward and backward of a block, its input counted, its output not."""
    with LiveStorages(layer) as live:
        x.view_as(x)  # so that the input is counted
        y = layer(x)
    assert y.requires_grad
    unit = x.numel() * x.element_size()
    return (live.bytes() - y.numel() * y.element_size()) / unit


@blocks
def test_a_block_leaves_12_units(name, monkeypatch) -> None:
    layer, x = block(name)
    with_recipes = saved_units(layer, x)
    monkeypatch.setattr("internvit.modeling.recompute.scope", contextlib.nullcontext)
    without = saved_units(layer, x)
    print(f"{name}: {without:.2f} units without recipes, {with_recipes:.2f} with")
    assert 17.9 < without < 18.2
    assert with_recipes < 12.1


@blocks
def test_recipes_change_no_bit(name, monkeypatch) -> None:
    layer, x = block(name)
    x = x[:, :129].detach().requires_grad_()
    grad = torch.randn_like(x)

    def grads() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    with_recipes = grads()
    monkeypatch.setattr("internvit.modeling.recompute.scope", contextlib.nullcontext)
    assert all(map(torch.equal, with_recipes, grads()))


def tiny(layers: int = 3) -> tuple[InternViT, Tensor]:
    model = InternViT(CONFIGS["tiny-rms_norm"].replace(num_hidden_layers=layers))
    random_weights(model)
    return model, images(model.config, 2)


def model_grads(model: InternViT, pixels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(pixels).last_hidden_state.square().mean(), list(model.parameters())))


def test_recipes_cross_layer_boundaries_in_the_encoder(monkeypatch) -> None:
    model, pixels = tiny()
    rebuilt = []
    run = recompute.Recipe.run
    monkeypatch.setattr(recompute.Recipe, "run", lambda self, shape: rebuilt.append(1) or run(self, shape))
    expected = model_grads(model, pixels)
    assert len(rebuilt) == 3 * 3, "two norms and one GELU a layer"
    monkeypatch.setattr("internvit.modeling.recompute.scope", contextlib.nullcontext)
    assert all(map(torch.equal, expected, model_grads(model, pixels)))


def test_a_checkpoint_around_a_layer_is_left_alone() -> None:
    layer, x = block("300m-2-layers")
    x = x[:, :65].detach().requires_grad_()
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    with LiveStorages(layer) as live:
        y = checkpoint(layer, x, use_reentrant=False)
    assert live.bytes() <= 1.1 * y.numel() * y.element_size(), "a checkpoint keeps its input alone"
    assert all(map(torch.equal, expected, torch.autograd.grad(y.sum(), [x, *layer.parameters()])))


def test_a_parameter_changed_between_forward_and_backward_is_an_error() -> None:
    model, pixels = tiny()
    loss = model(pixels).last_hidden_state.sum()
    with torch.no_grad():
        model.encoder.layers[0].norm2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_frozen_and_no_grad() -> None:
    model, pixels = tiny()
    model.requires_grad_(False)
    assert not model(pixels).last_hidden_state.requires_grad
    model.encoder.layers[1].attn.proj.weight.requires_grad_()
    model(pixels).last_hidden_state.sum().backward()
    with torch.no_grad():
        assert not recompute.active()
        with recompute.scope():
            assert not recompute.active()


def test_retained_graphs_rebuild_twice() -> None:
    model, pixels = tiny()
    loss = model(pixels).last_hidden_state.square().mean()
    first = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(model.parameters()))))
