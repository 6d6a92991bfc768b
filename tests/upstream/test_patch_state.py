"""Patched blocks run their own parameters, as they are: replicas, copies, pickles, edits in place."""

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit import PatchHandle
from internvit.numerics import relative_error
from tests.support.models import (
    CONFIGS,
    counted,
    features,
    images,
    random_weights,
    replicate,
    timm_judge,
    transformers_judge,
)

JUDGES = {"timm": timm_judge, "transformers": transformers_judge}
each_judge = pytest.mark.parametrize("name", JUDGES)


def patched(name: str) -> tuple[nn.Module, Tensor]:
    config = CONFIGS["tiny-layer_norm"]
    reference = internvit.reference.InternViT(config)
    random_weights(reference)
    model = JUDGES[name](config, reference.state_dict())
    internvit.patch(model)
    return model, images(config, 2)


@each_judge
def test_data_parallel_replicas_run_their_own_parameters(name) -> None:
    model, pixels = patched(name)
    replica = replicate(model, 1.25)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.25)
    expected = features(scaled, pixels)
    with counted() as ran:
        ours = features(replica, pixels)
    assert len(ran) == 3
    assert relative_error(ours, expected) < 1e-6
    assert relative_error(features(replicate(replica, 1.0), pixels), expected) < 1e-6
    ours.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "layer" in n or "block" in n)


@each_judge
def test_undo_takes_replication_back(name) -> None:
    model, pixels = patched(name)
    PatchHandle.of(model).undo()
    assert not any("_replicate_for_data_parallel" in m.__dict__ for m in model.modules())
    with counted() as ran:
        features(replicate(model, 1.0), pixels)
    assert not ran


@each_judge
def test_copies_and_pickles_replicate_themselves(name) -> None:
    model, pixels = patched(name)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(replicate(model, 1.0))),
    ]
    expected = features(model, pixels)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    for other in copies:
        assert torch.equal(features(other, pixels), expected)
        assert torch.equal(features(replicate(other, 1.0), pixels), expected)
    shallow = copy.copy(model)  # shares the model's dictionary of parameters, as any nn.Module's
    assert torch.equal(features(shallow, pixels), features(model, pixels))


@each_judge
@pytest.mark.parametrize("edit", ["pre-hook", "relu", "dropout"])
def test_gradients_after_an_edit_in_place(name, edit) -> None:
    """In a Sequential around a Linear a block stands aside; a pre-hook makes it stand aside as well."""
    model, pixels = patched(name)
    block = next(m for m in model.modules() if type(m).__name__ in ("Block", "InternVLVisionLayer"))
    fc2 = block.mlp.fc2
    if edit == "pre-hook":
        fc2.register_forward_pre_hook(lambda module, args: (args[0].mul_(2),))
    else:
        block.mlp.fc2 = nn.Sequential(nn.ReLU(inplace=True) if edit == "relu" else nn.Dropout(0.5, inplace=True), fc2)
    grads = []
    for _ in range(2):
        model.zero_grad()
        torch.manual_seed(3)
        features(model.train(), pixels).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        if len(grads) == 1:
            PatchHandle.of(model).undo()
    for n, gradient in grads[0].items():
        if not n.endswith("k_proj.bias"):
            assert (gradient - grads[1][n]).norm() <= 1e-4 * grads[1][n].norm() + 1e-7, n


@each_judge
def test_functional_calls_use_the_parameters_given(name) -> None:
    model, pixels = patched(name)
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    call = torch.func.functional_call
    if name == "timm":
        model.forward = model.forward_features
    out = call(model, zeros, (pixels,))
    out = out if isinstance(out, Tensor) else out.last_hidden_state
    assert not out[:, 1:].any()


@each_judge
def test_sixteen_threads(name) -> None:
    model, _ = patched(name)
    sizes = {"timm": [(56, 56)], "transformers": [(56, 56), (70, 56), (28, 84), (42, 42)]}[name]
    inputs = [torch.randn(1 + i % 3, 3, *sizes[i % len(sizes)]) for i in range(16)]
    with torch.no_grad():
        expected = [features(model, x) for x in inputs]
    failures: list[str] = []

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                if not torch.equal(features(model, inputs[index]), expected[index]):
                    failures.append(f"thread {index}")

    threads = [threading.Thread(target=run, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("changed", ["Attention", "Block"])
def test_a_forward_that_a_class_gets_before_or_after_runs(changed, monkeypatch) -> None:
    """Its name is the class's still: the fused ops computed what the class had been written to compute."""
    from timm.models import vision_transformer

    def values_alone(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return self.proj(self.qkv(x).chunk(3, -1)[2])

    def mlp_alone(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return x + self.ls2(self.mlp(self.norm2(x)))

    module_class = getattr(vision_transformer, changed)
    model, pixels = patched("timm")
    plain = features(model, pixels)
    with monkeypatch.context() as other:
        other.setattr(module_class, "forward", {"Attention": values_alone, "Block": mlp_alone}[changed])
        ours = features(model, pixels)
        assert torch.equal(features(copy.deepcopy(model), pixels), ours)
        fresh = timm_judge(config := CONFIGS["tiny-layer_norm"], internvit.reference.InternViT(config).state_dict())
        with pytest.raises(ValueError, match=f"{changed} with another forward"):
            internvit.patch(fresh)
    assert relative_error(ours, plain) > 1e-3
    assert torch.equal(features(model, pixels), plain)


def test_a_gelu_that_is_approximate_later_runs() -> None:
    model, pixels = patched("timm")
    exact = features(model, pixels)
    for block in model.blocks:
        block.mlp.act.approximate = "tanh"
    with counted() as ran:
        ours = features(model, pixels)
    assert not ran
    assert not torch.equal(ours, exact)
    assert all("not the exact (erf) GELU" in why for why in PatchHandle.of(model).left.values())


@pytest.mark.parametrize("fused", [True, False])
def test_the_scale_is_what_timms_attention_takes(fused) -> None:
    """Its fused attention leaves the attribute out."""
    model, pixels = patched("timm")
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = fused, 0.3
    with counted() as ran:
        ours = features(model, pixels)
    assert len(ran) == 3
    PatchHandle.of(model).undo()
    assert relative_error(ours, features(model, pixels)) < 1e-5


def test_another_attention_implementation_is_called() -> None:
    from transformers import AttentionInterface

    def of_mean_values(module, q, k, v, mask, **_):  # type: ignore[no-untyped-def]
        return v.mean(2, keepdim=True).expand_as(v).transpose(1, 2), None

    AttentionInterface.register("mean_values", of_mean_values)
    model, pixels = patched("transformers")
    fused = features(model, pixels)
    model.set_attn_implementation("mean_values")
    with counted() as ran:
        ours = features(model, pixels)
    assert not ran
    assert relative_error(ours, fused) > 1e-3
    model.set_attn_implementation("eager")
    assert torch.equal(features(model, pixels), fused)


def test_a_block_without_its_attention_says_so() -> None:
    model, pixels = patched("timm")
    del model.blocks[1].attn
    with pytest.raises(AttributeError, match="'Block' object has no attribute 'attn'"):
        features(model, pixels)
    (why,) = internvit.PatchHandle.of(model).left.values()
    assert why == "attn is a NoneType and mlp a Mlp, expected Attention and Mlp"


@each_judge
def test_hooks_of_all_modules_see_the_modules_inside(name) -> None:
    model, pixels = patched(name)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        features(model, pixels)
    finally:
        hook.remove()
    assert seen.count(nn.Linear) >= 4 * 3
