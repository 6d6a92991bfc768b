"""What a block leaves for backward, counted by live storages, and that recomputing changes no bit of any gradient."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import internvit
from internvit import InternViT
from internvit.benchmarks.harness.memory import LiveStorages, saved_units
from internvit.model import fused_block, recompute
from internvit.model.block import InternViTLayer
from tests.support.models import CONFIGS, images, random_weights

blocks = pytest.mark.parametrize("name", ["300m-2-layers", "6b-2-layers"])


def block(name: str, tokens: int | None = None) -> tuple[InternViTLayer, Tensor]:
    """A bfloat16 block, and an input of the model's own number of tokens."""
    config = CONFIGS[name]
    layer = InternViTLayer(config, device="meta", dtype=torch.bfloat16).to_empty(device="cpu")
    random_weights(layer)
    x = torch.randn(1, tokens or config.num_tokens, config.hidden_size, dtype=torch.bfloat16)
    return layer, x.requires_grad_()


def counted(name: str, tokens: int | None = None) -> tuple[InternViTLayer, Tensor]:
    """A block of which only sizes are asked: the 6B's has no memory, which spares its products."""
    if name.startswith("300m"):
        return block(name, tokens)
    config = CONFIGS[name]
    layer = InternViTLayer(config, device="meta", dtype=torch.bfloat16)
    x = torch.empty(1, config.num_tokens, config.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return layer, x


@blocks
def test_a_block_leaves_12_units(name, monkeypatch) -> None:
    layer, x = counted(name)
    recomputing = saved_units(layer, x)
    monkeypatch.setattr("internvit.model.recompute.scope", contextlib.nullcontext)
    without = saved_units(layer, x)
    print(f"{name}: {without:.2f} units kept, {recomputing:.2f} recomputing")
    assert 17.9 < without < 18.2
    assert recomputing < 12.1


def set_mode(layer: InternViTLayer, mode: str) -> None:
    layer.options.checkpointing = "selective" if "selective" in mode else "none"
    layer.options.fold_layer_scale = "folded" in mode


MODES = {"none": (12.1, 2.1), "folded": (10.1, 2.1), "selective": (5.1, 2.8), "selective folded": (5.1, 2.8)}
"""The most units that a block leaves, and the most of backward's FLOPs over forward's."""


@pytest.mark.sampled(4)
@blocks
def test_units_of_each_mode(name) -> None:
    layer, x = counted(name)
    for mode in MODES:
        set_mode(layer, mode)
        units = saved_units(layer, x)
        print(f"{name} {mode}: {units:.2f} units")
        assert units < MODES[mode][0]


def test_tensors_without_memory_are_told_apart() -> None:
    """Where memory is planned on the meta device; all their addresses are 0."""
    layer, x = counted("6b-2-layers")
    assert 11.9 < saved_units(layer, x) < 12.1
    layer(x).sum().backward()
    assert x.grad is not None


@blocks
def test_flops_of_each_mode(name) -> None:
    """Of the GEMMs and attention, backward over forward; of the 300M at fewer tokens for time."""
    layer, x = counted(name, 257)
    for mode in MODES:
        set_mode(layer, mode)
        with FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        flops = backward.get_total_flops() / forward.get_total_flops()
        print(f"{name} {mode}: backward {flops:.2f} times forward")
        assert 2 < flops < MODES[mode][1]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["300m-2-layers", "tiny-rms_norm"])
@pytest.mark.parametrize("folded", ["", " folded"])
def test_selective_checkpointing_changes_no_bit(name, folded) -> None:
    layer, x = block(name)
    layer.drop_path_rate = 0.5
    x = x[:, :65].detach().repeat(5, 1, 1).requires_grad_()
    grad = torch.randn_like(x)

    def run(mode: str) -> tuple[Tensor, ...]:
        set_mode(layer, mode)
        torch.manual_seed(11)
        y = layer(x)
        torch.rand(7)  # so that backward finds another state than forward
        return y, *torch.autograd.grad(y, [x, *layer.parameters()], grad)

    plain, selective = run("none" + folded), run("selective" + folded)
    assert all(map(torch.equal, plain, selective))
    torch.manual_seed(12)
    assert not torch.equal(layer(x), plain[0]), "another seed drops other paths"


@pytest.mark.sampled(2)
@blocks
def test_recomputing_changes_no_bit(name, monkeypatch) -> None:
    layer, x = block(name)
    x = x[:, :129].detach().requires_grad_()
    grad = torch.randn_like(x)

    def grads() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    recomputing = grads()
    monkeypatch.setattr("internvit.model.recompute.scope", contextlib.nullcontext)
    assert all(map(torch.equal, recomputing, grads()))


def tiny(layers: int = 3) -> tuple[InternViT, Tensor]:
    model = InternViT(CONFIGS["tiny-rms_norm"].replace(num_hidden_layers=layers))
    random_weights(model)
    return model, images(model.config, 2)


def model_grads(model: InternViT, pixels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(pixels).last_hidden_state.square().mean(), list(model.parameters())))


def test_recomputation_crosses_layer_boundaries_in_the_encoder(monkeypatch) -> None:
    model, pixels = tiny()
    rebuilt = []
    run = recompute.Rematerialization.run
    monkeypatch.setattr(recompute.Rematerialization, "run", lambda self, shape: rebuilt.append(1) or run(self, shape))
    expected = model_grads(model, pixels)
    assert len(rebuilt) == 3 * 3, "two norms and one GELU a layer"
    monkeypatch.setattr("internvit.model.recompute.scope", contextlib.nullcontext)
    assert all(map(torch.equal, expected, model_grads(model, pixels)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_a_model_holds_what_its_blocks_leave(mode, monkeypatch) -> None:
    """During forward too: an entry made inside a checkpoint would hold the pre-activation until the encoder ends."""
    model, _ = tiny(4)
    x = torch.randn(2, 257, model.config.hidden_size, requires_grad=True)
    model.set_gradient_checkpointing(mode)
    alive, run = [], fused_block.fc1_gelu

    def counting(fc1: nn.Module, normed: Tensor) -> Tensor:
        alive.append(live.bytes())
        return run(fc1, normed)

    monkeypatch.setattr("internvit.model.block.fc1_gelu", counting)
    with LiveStorages(model) as live:
        model(pixel_embeds=x)
    a_layer = (alive[-1] - alive[1]) / (len(alive) - 2) / (x.numel() * x.element_size())
    inner = model.config.intermediate_size / model.config.hidden_size
    expected = {"none": 8 + inner, "selective": 5, "block": 1}[mode]
    assert expected - 0.1 < a_layer < expected + 0.3, "lse and rstd are 0.1 of a unit at this width"


def test_gradient_checkpointing_modes_and_bad_input() -> None:
    model, pixels = tiny()
    grads = {}
    for mode in ("none", "selective", "block"):
        model.set_gradient_checkpointing(mode)
        assert model.encoder.gradient_checkpointing == (mode != "none")
        grads[mode] = model_grads(model, pixels)
        assert all(map(torch.equal, grads["none"], grads[mode])), mode
    model.encoder.gradient_checkpointing = True  # as transformers does
    assert all(layer.options.checkpointing == "block" for layer in model.encoder.layers)
    with pytest.raises(ValueError, match="mode must be one of 'none', 'selective', 'block', got 'all'"):
        model.set_gradient_checkpointing("all")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mode", ["none", "selective", "block"])
@pytest.mark.parametrize("folded", [False, True])
def test_every_mode_compiles_whole(mode, folded) -> None:
    model = InternViT(CONFIGS["tiny-rms_norm"].replace(drop_path_rate=0.6), fold_layer_scale=folded)
    random_weights(model)
    model.set_gradient_checkpointing(mode)
    pixels = images(model.config, 3)

    def grads(call: nn.Module) -> list[Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(call(pixels).last_hidden_state.square().mean(), list(model.parameters())))

    torch._dynamo.reset()
    compiled = grads(torch.compile(model, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, grads(model), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


@pytest.mark.parametrize("hooked", ["attn", "mlp", "attn.proj", "mlp.fc2", "norm1", "norm2", ""])
def test_hooks_are_called_in_every_mode(hooked) -> None:
    """And give the same bits; a hooked Linear is not folded, the other one is."""
    model, pixels = tiny()
    expected = model_grads(model, pixels)
    calls = []
    middle = model.encoder.layers[1]
    middle.get_submodule(hooked).register_forward_hook(lambda *_: calls.append(1))
    assert all(map(torch.equal, expected, model_grads(model, pixels)))
    assert calls == [1]
    model.set_gradient_checkpointing("selective")
    assert all(map(torch.equal, expected, model_grads(model, pixels)))
    assert len(calls) in (2, 3)  # twice where it is recomputed
    model.set_layer_scale_folding(True)
    for a, b in zip(model_grads(model, pixels), expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
    assert len(calls) > 2


def test_folding_leaves_adapters_and_eval_alone() -> None:
    model, pixels = tiny()
    with torch.no_grad():
        plain = model(pixels).last_hidden_state
    seen = []

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.shape)
            return self.base(x)

    keys = list(model.state_dict())
    model.set_layer_scale_folding(True)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(model(pixels).last_hidden_state, plain)
    proj = model.encoder.layers[1].attn.proj
    model.encoder.layers[1].attn.proj = Adapter(proj)
    folded = model(pixels).last_hidden_state
    assert len(seen) == 1
    assert not torch.equal(folded, plain)
    assert (folded - plain).norm() <= 1e-5 * plain.norm()


def test_a_checkpoint_around_a_layer_is_left_alone() -> None:
    layer, x = block("300m-2-layers")
    x = x[:, :65].detach().requires_grad_()
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    with LiveStorages(layer) as live:
        y = checkpoint(layer, x, use_reentrant=False)
    assert live.bytes() <= 1.1 * y.numel() * y.element_size(), "a checkpoint keeps its input alone"
    assert all(map(torch.equal, expected, torch.autograd.grad(y.sum(), [x, *layer.parameters()])))


def raising(model: nn.Module, pixels: Tensor) -> set[str]:
    """The parameters whose change between forward and backward backward refuses."""
    found = set()
    for name, parameter in model.named_parameters():
        loss = model(pixels).last_hidden_state.square().sum()
        with torch.no_grad():
            parameter.mul_(2)
        try:
            loss.backward()
        except RuntimeError as error:
            if "modified" not in str(error):
                raise
            found.add(name)
    return found


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])
def test_a_parameter_changed_between_forward_and_backward_is_an_error(name, folded) -> None:
    """Wherever plain PyTorch says so; saved-tensor hooks switch its own check off."""
    reference = internvit.reference.InternViT(CONFIGS[name].replace(num_hidden_layers=2, drop_path_rate=0.0)).train()
    random_weights(reference)
    model = InternViT(reference.config, fold_layer_scale=folded).train()
    model.load_state_dict(reference.state_dict())
    pixels = images(model.config, 2)
    expected = raising(reference, pixels)
    assert {
        f"encoder.layers.1.{part}" for part in ("attn.qkv.weight", "mlp.fc2.weight", "ls1", "norm1.weight")
    } <= expected
    assert expected <= raising(model, pixels)


def test_an_optimizer_step_between_two_backwards_is_an_error() -> None:
    model, pixels = tiny()
    features = model(pixels).last_hidden_state
    features.square().mean().backward(retain_graph=True)
    torch.optim.SGD(model.encoder.layers[1].mlp.fc1.parameters(), 1.0).step()
    with pytest.raises(RuntimeError, match="modified in place"):
        features.pow(3).mean().backward()


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


def in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


def edit_before_a_linear(model: nn.Module, edit: str) -> None:
    """Puts an op that writes into its input in front of a Linear of the first block."""
    layer = model.encoder.layers[0]
    owner, name = edit.split()[1].split(".")
    linear = getattr(getattr(layer, owner), name)
    if edit.startswith("pre-hook"):
        linear.register_forward_pre_hook(lambda module, args: (in_place(args[0]),))
    elif edit.startswith("data"):
        linear.register_forward_pre_hook(lambda module, args: setattr(module, "seen", in_place(args[0].data)))
    elif edit.startswith("view"):
        hook = lambda module, args: setattr(module, "seen", in_place(args[0].view(-1)[::2]))  # noqa: E731
        linear.register_forward_pre_hook(hook)
    elif edit.startswith("relu"):
        setattr(getattr(layer, owner), name, nn.Sequential(nn.ReLU(inplace=True), linear))
    else:
        setattr(getattr(layer, owner), name, nn.Sequential(nn.Dropout(0.5, inplace=True), linear))


@pytest.mark.parametrize(
    "edit",
    [
        *(
            "pre-hook attn.qkv",
            "view attn.qkv",
            "data attn.qkv",
            "pre-hook mlp.fc1",
            "data mlp.fc1",
            "pre-hook mlp.fc2",
        ),
        *("data mlp.fc2", "relu mlp.fc2", "dropout mlp.fc2"),
    ],
)
@pytest.mark.parametrize("name", ["tiny-rms_norm", "tiny-layer_norm"])
@pytest.mark.parametrize("mode", ["none", "selective"])
def test_gradients_after_an_edit_in_place(edit, name, mode) -> None:
    """Backward must use the tensor that the Linear used, not the one that would be computed again."""
    reference = internvit.reference.InternViT(CONFIGS[name])
    random_weights(reference)
    model = InternViT(CONFIGS[name])
    model.load_state_dict(reference.state_dict())
    model.set_gradient_checkpointing(mode)
    pixels = images(model.config, 2)
    grads = []
    for m in (model, reference):
        edit_before_a_linear(m, edit)
        torch.manual_seed(5)
        m.train()(pixels).last_hidden_state.square().mean().backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    for n, gradient in grads[0].items():
        expected = grads[1][n]
        assert (gradient - expected).norm() <= 1e-4 * expected.norm() + 1e-7, n


@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_gradients_after_a_branch_is_edited_through_data(branch) -> None:
    reference = internvit.reference.InternViT(CONFIGS["tiny-layer_norm"]).train()
    random_weights(reference)
    model = InternViT(reference.config)
    model.load_state_dict(reference.state_dict())
    pixels = images(model.config, 2)
    for m in (model, reference):
        hook = lambda module, args: setattr(module, "seen", in_place(args[0].data))  # noqa: E731
        getattr(m.encoder.layers[1], branch).register_forward_pre_hook(hook)
    ours, theirs = model_grads(model, pixels), model_grads(reference, pixels)
    for (n, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7, n


def test_what_is_not_edited_is_still_recomputed(monkeypatch) -> None:
    model, pixels = tiny(1)
    edit_before_a_linear(model, "pre-hook mlp.fc2")
    computed = []
    run = recompute.Rematerialization.run
    monkeypatch.setattr(recompute.Rematerialization, "run", lambda self, shape: computed.append(1) or run(self, shape))
    model_grads(model, pixels)
    assert len(computed) == 2, "the two norms; GELU's output was edited"


def test_two_threads_train_two_models() -> None:
    """Each on its own: what one registers is not the other's."""
    models = [tiny(2) for _ in range(4)]
    expected = [model_grads(*each) for each in models]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for ours, theirs in zip(pool.map(lambda each: model_grads(*each), models), expected, strict=True):
                assert all(map(torch.equal, ours, theirs))
