"""LoRA, int8 weights, DDP and FSDP on the fused model and on patched upstream models."""

import copy

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, counted, images, opengvlab_judge, random_weights
from tests.support.ranks import run_ranks

TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


def reference(name: str) -> internvit.reference.InternViT:
    model = internvit.reference.InternViT(CONFIGS[name]).eval()
    random_weights(model)
    return model


def fused(name: str) -> tuple[nn.Module, nn.Module]:
    """The fused model and the reference with the same weights."""
    judge = reference(name)
    model = internvit.InternViT(judge.config).eval()
    model.load_state_dict(judge.state_dict())
    return model, judge


def with_lora(model: nn.Module, **settings) -> nn.Module:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(7)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **settings))
    torch.manual_seed(8)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.1)
    return model


def lora_grads(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(pixels).last_hidden_state.square().mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["tiny-layer_norm", "tiny-rms_norm"])
def test_lora_trains_with_the_gradients_of_the_reference_and_merges(name) -> None:
    model, judge = (with_lora(m) for m in fused(name))
    pixels = images(CONFIGS[name], 2)
    grads, judged = lora_grads(model, pixels), lora_grads(judge, pixels)
    assert len(grads) == 2 * 3 * len(TARGETS)
    assert grads.keys() == judged.keys()
    for n, grad in grads.items():
        assert relative_error(grad, judged[n]) <= 1e-5, n
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.5) for m in (model, judge)]
    for _ in range(3):
        for m, optimizer in zip((model, judge), optimizers, strict=True):
            lora_grads(m, pixels)
            optimizer.step()
    trained, expected = model(pixels).last_hidden_state, judge(pixels).last_hidden_state
    assert relative_error(trained, expected) <= 1e-4
    merged = model.merge_and_unload()
    assert type(merged) is internvit.InternViT
    assert relative_error(merged(pixels).last_hidden_state, trained) <= 1e-5
    assert merged.state_dict().keys() == fused(name)[0].state_dict().keys()


def test_lora_on_some_layers_of_a_patched_model() -> None:
    config = CONFIGS["tiny-rms_norm"]
    weights = reference("tiny-rms_norm").state_dict()
    pixels = images(config, 2)
    plain = with_lora(opengvlab_judge(config, weights), layers_to_transform=[1])
    model = with_lora(opengvlab_judge(config, weights), layers_to_transform=[1])
    handle = internvit.patch(model)
    assert list(handle.left) == ["base_model.model.encoder.layers.1"]
    assert "peft" in handle.left["base_model.model.encoder.layers.1"]
    grads, expected = lora_grads(model, pixels), lora_grads(plain, pixels)
    assert grads.keys() == expected.keys()
    for n, grad in grads.items():
        assert relative_error(grad, expected[n]) <= 1e-5, n
    out = model(pixels).last_hidden_state
    merged = model.merge_and_unload()
    assert len(internvit.PatchHandle.of(merged).fused) == 3, "a merged layer is fused again"
    assert relative_error(merged(pixels).last_hidden_state, out) <= 1e-5


def quantised(model: nn.Module) -> nn.Module:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Linear) and "layers.1." in name,
    )
    return model


def test_int8_weights() -> None:
    """torchao's int8 weight-only Linears in one layer: that layer's Linears run as torchao's, the rest is as before."""
    model, judge = fused("tiny-layer_norm")
    pixels = images(judge.config, 2)
    upstream = opengvlab_judge(judge.config, judge.state_dict())
    exact = judge(pixels).last_hidden_state
    with torch.no_grad():
        expected = quantised(judge)(pixels).last_hidden_state
        assert relative_error(expected, exact) > 1e-4, "nothing was quantised"
        assert relative_error(quantised(model)(pixels).last_hidden_state, expected) <= 1e-5
        handle = internvit.patch(upstream)
        quantised(upstream)
        assert list(handle.left) == ["encoder.layers.1"]
        assert "weight is a" in handle.left["encoder.layers.1"]
        assert relative_error(upstream(pixels).last_hidden_state, expected) <= 1e-5
    restored = copy.deepcopy(model)
    assert torch.equal(restored(pixels).last_hidden_state, model(pixels).last_hidden_state)


def _expected(judge: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's output, and its gradient of the first MLP's second Linear, over both processes' images."""
    out = judge(pixels).last_hidden_state
    out.square().mean().backward()
    return out.detach(), judge.encoder.layers[0].mlp.fc2.weight.grad


def _models() -> dict[str, nn.Module]:
    """The fused model and a patched upstream: patched first, wrapped afterwards."""
    model, judge = fused("tiny-rms_norm")
    upstream = opengvlab_judge(judge.config, judge.state_dict())
    internvit.patch(upstream)
    return {"fused": model, "patched": upstream, "reference": judge}


def _check(model: nn.Module, rank: int, pixels: Tensor, expected: Tensor, expected_grad: Tensor) -> None:
    mine = slice(2 * rank, 2 * rank + 2)
    out = model(pixels[mine]).last_hidden_state
    out.square().mean().backward()
    assert relative_error(out, expected[mine]) <= 1e-5
    grad = next(p.grad for n, p in model.named_parameters() if n.endswith("0.mlp.fc2.weight"))
    grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    assert relative_error(grad, expected_grad) <= 1e-5


def _in_group() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for sharded in (False, True):
        torch.manual_seed(0)
        models = _models()
        pixels = images(CONFIGS["tiny-rms_norm"], 4)
        expected = _expected(models.pop("reference"), pixels)
        for name, model in models.items():
            wrapped: nn.Module = model
            if sharded:
                mesh = init_device_mesh("cpu", (2,))
                for block in model.encoder.layers:
                    fully_shard(block, mesh=mesh)
                fully_shard(model, mesh=mesh)
            else:
                wrapped = nn.parallel.DistributedDataParallel(model)
            with counted() as ran:
                _check(wrapped, torch.distributed.get_rank(), pixels, *expected)
            assert len(ran) == (3 if name == "patched" else 0)


def test_ddp_and_fsdp() -> None:
    """Patch, then wrap: the outputs and mean gradients of one process with all images, in two processes over gloo."""
    run_ranks(2, _in_group)
