"""FSDP2 by block, alone and with tensor parallelism, against one process; and that its blocks stay fused."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from internvit import InternViT, InternViTConfig
from internvit.benchmarks.reports.memory_passes import TOKENS, Traffic
from internvit.numerics import relative_error
from internvit.optim import param_groups_layer_decay
from internvit.parallel import load_checkpoint, parallelize, save_checkpoint, shard_blocks
from internvit.parallel.shards import full_parameters
from tests.parallel.test_tensor_parallel import TINY, whole
from tests.support.models import images
from tests.support.ranks import run_ranks, thorough

MODES = ("none", "selective", "block")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor) -> Tensor:
    """One step with clipped gradients; returns their norm."""
    model(pixels).last_hidden_state.square().mean().backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """Its steps are as large as the gradients, unlike AdamW's, which are those of a gradient near zero too."""
    return torch.optim.SGD(param_groups_layer_decay(model, 0.05, 0.9, 3.0))


def check_training(config: InternViTConfig, dp: DeviceMesh, tp: DeviceMesh | None, mode: str, seed: int) -> None:
    torch.manual_seed(seed)
    pixels = images(config, 2 * dp.size())
    plain, model = whole(config, seed).train(), whole(config, seed).train()
    if tp is not None:
        parallelize(model, tp)
    shard_blocks(model, dp)
    model.set_gradient_checkpointing(mode)
    expected, ours = sgd(plain), sgd(model)
    before = {name: p.detach().clone() for name, p in plain.named_parameters()}
    rank = dp.get_local_rank() if dp.ndim == 1 else torch.distributed.get_rank()  # (replicate, shard): all ranks
    for _ in range(2):
        norm = step(model, ours, pixels.chunk(dp.size())[rank])
        assert norm.item() == pytest.approx(step(plain, expected, pixels).item(), rel=1e-4)
    after = dict(plain.named_parameters())
    for name, tensor in full_parameters(model):
        if tensor is not None:
            moved = (after[name] - before[name]).norm()
            assert (tensor - after[name]).norm() <= 1e-3 * moved, (name, mode)


def check_all(seed: int, folder: str, thorough: bool) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    flat = init_device_mesh("cpu", (4,))
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for index, config in enumerate(TINY.values()):
        if thorough or index == 0:
            check_training(config, flat, None, MODES[index], seed)
        if thorough or index == 1:
            check_training(config, hybrid, None, MODES[index], seed)
        for mode in MODES if thorough else MODES[index : min(index + 1, 2)]:
            check_training(config, grid["dp"], grid["tp"], mode, seed)
    config = TINY["25 heads, rms_norm, QK-norm"]
    first = shard_blocks(parallelize(whole(config, seed), grid["tp"]), grid["dp"])
    save_checkpoint(first, folder)
    for other in (
        shard_blocks(whole(config, seed + 1), flat),
        parallelize(whole(config, seed + 1), flat),
        shard_blocks(parallelize(whole(config, seed + 1), grid["dp"]), grid["tp"]),
    ):
        load_checkpoint(other, folder)
        expected = whole(config, seed).state_dict()
        for name, tensor in full_parameters(other):
            assert tensor is None or torch.equal(tensor, expected[name]), name


@thorough
def test_training_of_one_process_and_checkpoints_of_other_layouts(seed, tmp_path, thorough) -> None:
    run_ranks(4, check_all, seed, str(tmp_path), thorough)


def run_once(model: InternViT, x: Tensor, seed: int) -> dict[str, Any]:
    """Units of [N, C] that forward and backward move; the gradients."""
    torch.manual_seed(seed)  # of DropPath
    x = x.detach().requires_grad_()
    with Traffic(TOKENS) as traffic:
        out = model(pixel_embeds=x).last_hidden_state
        out.backward(torch.ones_like(out))
    gradients = {name: p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for name, p in
                 model.encoder.named_parameters()}  # fmt: skip
    return {"units": traffic.elements / (TOKENS * x.shape[-1]), "out": out.detach(), "x": x.grad, **gradients}


def check_passes(seed: int) -> list[tuple[float, float, float]]:
    mesh = init_device_mesh("cpu", (1,))
    counts = []
    for config in TINY.values():
        config = config.replace(num_hidden_layers=3, drop_path_rate=0.3)
        plain, sharded, by_hand, hooked = (whole(config, seed).train() for _ in range(4))
        shard_blocks(sharded, mesh)
        shard_blocks(hooked, mesh)
        seen = []
        hooked.encoder.layers[1].register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out))
        for layer in by_hand.encoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(by_hand, mesh=mesh)
        x = torch.randn(1, TOKENS, config.hidden_size)
        expected, *others = (run_once(model, x, seed) for model in (plain, sharded, by_hand, hooked))
        for result in others:
            assert all(torch.equal(result[name], t) for name, t in expected.items() if name != "units")
        assert torch.is_tensor(seen[0]), "a hook gets the block's output, not a branch apart"
        with warnings.catch_warnings():
            warnings.filterwarnings("error", r"FSDP2-wrapped module \(FSDPInternViTLayer\) returned a view")
            sharded(pixel_embeds=x)
        with torch.no_grad():
            states = [
                m(pixel_embeds=x, output_hidden_states=True).hidden_states for m in (plain.eval(), sharded.eval())
            ]
        assert all(map(torch.equal, *states))
        counts.append((expected["units"], others[0]["units"], others[1]["units"]))
    return counts


def test_wrapped_blocks_move_no_more_than_others(seed) -> None:
    """One unit forward and three backward a boundary are what torch's fully_shard of each block alone adds: 4 %."""
    for plain, sharded, by_hand in run_ranks(1, check_passes, seed)[0]:
        assert sharded == plain
        assert by_hand == plain + 2 * 4


def check_mixed_precision(seed: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    config = TINY["25 heads, rms_norm, QK-norm"].replace(drop_path_rate=0.4)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = shard_blocks(whole(config, seed).train(), mesh, mp_policy=policy)
    plain = whole(config, seed).train()
    torch.manual_seed(seed)
    pixels = images(config, 2)
    results = []
    for m in (model, plain):
        torch.manual_seed(seed + 1)
        out = m(pixels).last_hidden_state
        out.float().square().mean().backward()
        results.append(out.detach().float())
    assert relative_error(*results) < 0.03
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        expected = plain.get_parameter(name).grad
        if not name.endswith("bias"):
            assert relative_error(parameter.grad.full_tensor(), expected) < 0.1, name


def check_float32_stream(seed: int) -> None:
    """A stream past float16's range, as InternViT's massive channels are, stays in float32 from block to block."""
    mesh = init_device_mesh("cpu", (2,))
    config = TINY["4 heads, QK-norm, bias"]
    for settings in ({}, {"output_dtype": torch.bfloat16}):
        model = whole(config, seed).train()
        with torch.no_grad():
            model.encoder.layers[0].mlp.fc2.bias[3], model.encoder.layers[0].ls2[3] = 6e4, 2.0
        model.encoder.residual_dtype = torch.float32
        pixels = images(config, 2)
        expected = model(pixels, output_hidden_states=True).hidden_states
        shard_blocks(model, mesh, mp_policy=MixedPrecisionPolicy(torch.float16, torch.float32, **settings))
        out = model(pixels, output_hidden_states=True)
        for ours, theirs in zip(out.hidden_states[1:-1], expected[1:-1], strict=True):
            assert relative_error(ours.float(), theirs) < 0.01
        assert out.hidden_states[1].dtype == settings.get("output_dtype", torch.float32)


def test_mixed_precision_with_drop_path_and_a_float32_stream(seed) -> None:
    run_ranks(2, check_mixed_precision, seed)
    run_ranks(2, check_float32_stream, seed)
