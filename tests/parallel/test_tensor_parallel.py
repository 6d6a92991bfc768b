"""Tensor parallelism against one process: outputs, every gradient, and the bytes that ranks send each other."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import internvit
from internvit import InternViT, InternViTConfig
from internvit.numerics import relative_error
from internvit.parallel import parallelize, tensor_parallel_plan
from tests.support import ROOT
from tests.support.models import images, random_weights
from tests.support.ranks import run_ranks, thorough

_TINY: dict[str, Any] = {"image_size": 28, "num_hidden_layers": 2, "intermediate_size": 112}
_LAYER_NORM: dict[str, Any] = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}
TINY = {
    "25 heads, rms_norm, QK-norm": InternViTConfig(**_TINY, hidden_size=200, num_attention_heads=25),
    "5 heads, layer_norm": InternViTConfig(**_TINY, **_LAYER_NORM, hidden_size=80, num_attention_heads=5),
    "4 heads, QK-norm, bias": InternViTConfig(**_TINY, hidden_size=32, num_attention_heads=4, qkv_bias=True),
}


def whole(config: InternViTConfig, seed: int, dtype: torch.dtype = torch.float32) -> InternViT:
    torch.manual_seed(seed)
    model = InternViT(config)
    random_weights(model)
    return model.to(dtype).eval()


def gradients(model: nn.Module, pixels: Tensor) -> Tensor:
    """The last hidden state; the parameters get the gradients of a function of it."""
    out = model(pixels).last_hidden_state
    torch.tanh(out.float()).square().sum().backward()
    return out.detach()


def check_gradients(split: InternViT, expected: dict[str, Tensor], limit: float) -> float:
    """The worst error of this rank's part of a gradient, over the norm of the whole gradient."""
    mesh = split.encoder.layers[0].attn.group.mesh
    plan = tensor_parallel_plan(split.config, mesh.size())
    worst = 0.0
    for name, parameter in split.named_parameters():
        reference, local = expected[name], parameter.grad.to_local()
        seen = torch.zeros_like(local)
        for region in plan.split(name, reference.shape).rank_regions(mesh.get_local_rank()):
            error = (local[region.local_index] - reference[region.source]).norm()
            if reference.any():  # or DropPath has dropped the branch of every image
                error /= reference.norm()
            worst = max(worst, error.item())
            assert error <= limit, (name, error)
            seen[region.local_index] = 1
        assert not local[seen == 0].any(), f"padding of {name} has a gradient"
    return worst


def compare(config: InternViTConfig, seed: int, batch: int, modes: tuple[str, ...]) -> None:
    """One configuration on all ranks."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    plain = whole(config, seed)
    pixels = images(config, batch)
    expected = gradients(plain, pixels)
    for mode in modes:
        split = parallelize(whole(config, seed + torch.distributed.get_rank()), mesh).train()
        split.set_gradient_checkpointing(mode)
        out = gradients(split, pixels)
        assert relative_error(out, expected) <= 1e-5, mode
        check_gradients(split, {n: p.grad for n, p in plain.named_parameters()}, 1e-5)
        split.zero_grad()
        for image in pixels.split(1):  # gradients of one image are views of each other more often
            gradients(split, image)
        check_gradients(split, {n: p.grad for n, p in plain.named_parameters()}, 1e-5)
        if mode == "none":
            with torch.no_grad():
                result = split.eval()(pixels, output_hidden_states=True)
                reference = plain(pixels, output_hidden_states=True)
            for ours, theirs in zip(result.hidden_states, reference.hidden_states, strict=True):
                assert relative_error(ours, theirs) <= 1e-5


def compare_all(seed: int, thorough: bool) -> None:
    modes = ("none", "selective", "block")
    chosen = [modes] * 3 if thorough else [(mode,) for mode in modes]
    for config, some in zip(TINY.values(), chosen, strict=True):
        if config.num_attention_heads >= torch.distributed.get_world_size():
            compare(config, seed, 2, some)


@thorough
def test_outputs_and_every_gradient_of_one_process(seed, thorough) -> None:
    for ranks in (2, 3, 4, 8) if thorough else (4,):
        run_ranks(ranks, compare_all, seed, thorough)


def inference_calls(plain: InternViT, pixels: Tensor) -> list[Callable[[Any], Tensor]]:
    connector = internvit.InternVLConnector(plain.config.hidden_size, 24)
    return [
        lambda m: m(pixels).pooler_output,
        lambda m: m.forward_intermediates(pixels, indices=1, intermediates_only=True)[0],
        lambda m: connector.extract_feature(m, pixels),
        lambda m: connector.extract_feature(m, pixels, select_layer=-2),
        lambda m: internvit.optimize_for_inference(m)(pixels).last_hidden_state,
        lambda m: m(pixel_embeds=plain.embeddings(pixels)).last_hidden_state,
    ]


@torch.no_grad()
def check_features(seed: int) -> None:
    """What users do with a model: on all ranks, against one process."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for config in TINY.values():
        plain = whole(config, seed)
        split = parallelize(whole(config, seed), mesh, src_data_rank=None)
        copied = copy.deepcopy(split)
        torch.manual_seed(seed)
        pixels = images(config, 3)
        for call in inference_calls(plain, pixels):
            assert relative_error(call(split), call(plain)) <= 1e-5
        assert torch.equal(copied(pixels).last_hidden_state, split(pixels).last_hidden_state)
        for rounding, backend in itertools.product(("reference", "fused"), ("reference", "sdpa")):
            for model in (plain, split):
                model.set_rounding(rounding)
            with internvit.backend(backend):
                assert relative_error(split(pixels).last_hidden_state, plain(pixels).last_hidden_state) <= 1e-5
        backbones = [internvit.InternViTBackbone.from_model(plain, out_indices=(0, 1)) for _ in range(2)]
        parallelize(backbones[1], mesh, src_data_rank=None)
        for ours, theirs in zip(backbones[1](pixels), backbones[0](pixels), strict=True):
            assert relative_error(ours, theirs) <= 1e-5


@torch.no_grad()
def check_half(seed: int) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for config in TINY.values():
        config = config.replace(image_size=112, hidden_size=4 * config.hidden_size, num_hidden_layers=4)
        plain = whole(config, seed, torch.bfloat16)
        reference = internvit.reference.InternViT(config).double().eval()
        reference.load_state_dict(plain.state_dict())
        torch.manual_seed(seed)
        pixels = images(config, 3).bfloat16()
        split = parallelize(whole(config, seed, torch.bfloat16), mesh, src_data_rank=None)
        truth = reference(pixels.double()).last_hidden_state
        # Slices of Linears are not packed; packed ones round GELU's input less.
        unpacked = internvit.optimize_for_inference(plain, pack=False)
        for ours, theirs in ((split, plain), (internvit.optimize_for_inference(split), unpacked)):
            errors = [relative_error(m(pixels).last_hidden_state, truth) for m in (ours, theirs)]
            assert errors[0] <= 1.02 * errors[1]


def check_drop_path_and_frozen_weights(seed: int) -> None:
    """Every rank's generator has another seed: the first rank's draws count, in recomputation too."""
    rank = torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    config = TINY["25 heads, rms_norm, QK-norm"].replace(drop_path_rate=0.5)
    plain = whole(config, seed).train()
    pixels = images(config, 4)
    torch.manual_seed(seed)
    expected = gradients(plain, pixels)
    reference = {name: p.grad for name, p in plain.named_parameters()}
    for mode in ("none", "selective", "block"):
        split = parallelize(whole(config, seed).train(), mesh, src_data_rank=None)
        split.set_gradient_checkpointing(mode)
        torch.manual_seed(seed + rank)
        assert relative_error(gradients(split, pixels), expected) <= 1e-5
        check_gradients(split, reference, 1e-5)
    frozen = parallelize(whole(config, seed), mesh, src_data_rank=None).requires_grad_(False)
    frozen.encoder.layers[1].mlp.requires_grad_(True)
    plain.eval().zero_grad()
    expected = gradients(plain, pixels)
    assert relative_error(gradients(frozen, pixels), expected) <= 1e-5
    assert [n for n, p in frozen.named_parameters() if p.grad is not None] == [
        f"encoder.layers.1.mlp.{name}" for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    autocast = parallelize(whole(config, seed), mesh, src_data_rank=None)
    with torch.autocast("cpu", torch.bfloat16):
        out = autocast(pixels).last_hidden_state
        theirs = plain(pixels).last_hidden_state
    out.square().mean().backward()
    assert out.dtype == theirs.dtype
    assert relative_error(out, theirs) < 0.02


class Wrapped(nn.Module):
    """A module in another's place that has its parameters, as PEFT's has."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any) -> Any:
        return self.base(*args)


def check_refusals(seed: int) -> None:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    config = TINY["4 heads, QK-norm, bias"]
    for model, ranks, message in (
        (nn.Linear(2, 2), mesh, "model must be an InternViT or InternViTBackbone, got Linear"),
        (InternViT(config), "tp", "mesh must be one dimension of a DeviceMesh, such as mesh\\['tp'\\], got str"),
        (parallelize(InternViT(config), mesh), mesh, "must have plain parameters, got DTensors"),
    ):
        with pytest.raises(ValueError, match=message):
            parallelize(model, ranks)
    hooked = InternViT(config)
    hooked.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"layers \[1\] have hooks, adapters or replaced parts"):
        parallelize(hooked, mesh)
    split = parallelize(InternViT(config), mesh)
    pixels = images(config, 1)
    with pytest.raises(ValueError, match="a tensor-parallel model has no attention maps"):
        split(pixels, output_attentions=True)
    handle = split.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *args: None)
    with pytest.raises(RuntimeError, match=r"mlp\.fc1 has hooks, which a tensor-parallel block does not run"):
        split(pixels)
    handle.remove()
    expected = split(pixels).last_hidden_state
    layer = split.encoder.layers[1]
    for name in ("attn", "attn.proj", "mlp.fc2", "norm1", "norm2"):  # an adapter, for instance, added after the split
        part = layer.get_submodule(name)
        layer.set_submodule(name, Wrapped(part))
        with pytest.raises(RuntimeError, match=r" is a Wrapped, which a tensor-parallel block does not run"):
            split(pixels)
        layer.set_submodule(name, part)
    nn.utils.parametrize.register_parametrization(layer.mlp.fc1, "bias", nn.Identity())
    assert torch.equal(split(pixels).last_hidden_state, expected)


def check_everything_else(seed: int) -> None:
    check_features(seed)
    check_half(seed)
    check_drop_path_and_frozen_weights(seed)
    check_refusals(seed)


def test_inference_training_and_refusals(seed) -> None:
    run_ranks(2, check_everything_else, seed)


def test_plans() -> None:
    config = InternViTConfig.from_name("internvit-6b-448px-v2.5")
    for ranks, heads in ((2, (13, 12)), (3, (9, 8, 8)), (4, (7, 6, 6, 6)), (8, (4, 3, 3, 3, 3, 3, 3, 3))):
        plan = tensor_parallel_plan(config, ranks)
        assert plan.heads == heads
        assert sum(plan.hidden) == config.intermediate_size
        for name, shape in config.parameter_shapes().items():
            split = plan.split(name, shape)
            covered = sum(math.prod(r.sizes) for rank in range(ranks) for r in split.rank_regions(rank))
            assert covered == math.prod(shape) * (ranks if split.dim is None else 1), name
    assert "attn.qkv.weight     Shard(dim=1)  3 x 896 + 768 + 768 + 768" in str(tensor_parallel_plan(config, 4))
    assert str(tensor_parallel_plan(config, 4)) in (ROOT / "docs" / "scale.md").read_text()
    for ranks in (0, 26, 2.0):
        with pytest.raises(ValueError, match="ranks must be from 1 to the 25 heads"):
            tensor_parallel_plan(config, ranks)
