"""Checkpoints of split models: read by slices, written by ranks, loaded on other numbers of them, to the bit."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from internvit import InternViT
from internvit.optim import param_groups_layer_decay
from internvit.parallel import from_pretrained, load_checkpoint, parallelize, save_checkpoint, save_pretrained
from internvit.parallel.shards import full_parameters
from tests.parallel.test_tensor_parallel import TINY, whole
from tests.support.models import images
from tests.support.ranks import run_ranks

CONFIG = TINY["4 heads, QK-norm, bias"].replace(num_attention_heads=8, num_hidden_layers=1)


def same_weights(model: nn.Module, plain: InternViT) -> None:
    expected = plain.state_dict()
    for name, tensor in full_parameters(model):
        assert tensor is None or torch.equal(tensor, expected[name]), name


def read_and_export(folder: str, layouts: tuple[str, ...], seed: int) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layout in layouts:
        plain = InternViT.from_pretrained(f"{folder}/{layout}")
        split = from_pretrained(f"{folder}/{layout}", mesh)
        same_weights(split, plain)
        back = f"{folder}/{layout}-back"
        save_pretrained(split, back, layout=layout)
        again = InternViT.from_pretrained(back)
        for name, tensor in plain.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
        assert split.encoder.layers[0].attn.qkv.weight.to_local().dtype == plain.dtype


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_reading_slices_of_any_layout_and_writing_it_back(ranks, seed, tmp_path) -> None:
    layouts = ("opengvlab", "transformers", "mmseg")
    for layout in layouts:
        whole(TINY["25 heads, rms_norm, QK-norm"], seed, torch.bfloat16).save_pretrained(
            tmp_path / layout, layout=layout
        )
    run_ranks(ranks, read_and_export, str(tmp_path), layouts, seed)
    for layout in layouts:
        written = (tmp_path / layout / "model.safetensors").read_bytes()
        assert (tmp_path / f"{layout}-back" / "model.safetensors").read_bytes() == written


def trained(model: nn.Module, pixels: Tensor, steps: int, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(steps):
        model(pixels).last_hidden_state.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(param_groups_layer_decay(model, 0.05, 0.9, 1e-2))


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest relative difference of a parameter; 0 only for the same bits."""
    pairs = zip(full_parameters(model), full_parameters(other), strict=True)
    return max(0.0 if a is None else ((a - b).norm() / b.norm()).item() for (_, a), (_, b) in pairs)


def save_and_resume(folder: str, seed: int) -> None:
    torch.manual_seed(seed)
    pixels = images(CONFIG, 2)
    mesh = init_device_mesh("cpu", (4,))
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    first = parallelize(whole(CONFIG, seed), mesh)
    optimizer = adamw(first)
    trained(first, pixels, 2, optimizer)
    save_checkpoint(first, folder, optimizer)
    resumed = []
    for number, ranks in enumerate((mesh, pairs["tp"]), 1):
        model = parallelize(whole(CONFIG, seed + number), ranks)
        state = adamw(model)
        load_checkpoint(model, folder, state)
        assert [g["lr"] for g in state.param_groups] == [g["lr"] for g in optimizer.param_groups]
        resumed.append((model, state))
    assert [distance(model, first) for model, _ in resumed] == [0, 0]
    for model, state in ((first, optimizer), *resumed):
        trained(model, pixels, 1, state)
    again, pair = (distance(model, first) for model, _ in resumed)
    assert again == 0, "the same number of ranks continues to the bit"
    assert pair <= 1e-4


def test_a_checkpoint_loads_on_another_number_of_ranks(seed, tmp_path) -> None:
    run_ranks(4, save_and_resume, str(tmp_path / "checkpoint"), seed)
    plain, expected = whole(CONFIG, seed + 3), whole(CONFIG, seed)
    state = {f"model.{name}": tensor for name, tensor in plain.state_dict().items()}
    dcp.load(state, checkpoint_id=str(tmp_path / "checkpoint"), no_dist=True)
    moved = [(state[f"model.{n}"] - t).norm() / t.norm() for n, t in expected.state_dict().items()]
    assert 0 < max(moved) < 0.5, "a plain InternViT reads it: the model of before, two steps later"
    with pytest.raises(ValueError, match="which has a file"):
        load_checkpoint(plain, tmp_path)


def peak_of_loading(folder: str) -> tuple[int, int]:
    """How many bytes the process has grown by at most while it read its part, and the part."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    from_pretrained(f"{folder}/small", mesh)  # what is imported and allocated once
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kib(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    clear.write_text("5")  # the peak is now the present size
    before = kib("VmRSS")
    model = from_pretrained(f"{folder}/large", mesh)
    peak = 1024 * (kib("VmHWM") - before)
    return peak, sum(p.to_local().nbytes for p in model.parameters())


def test_a_rank_reads_its_part_and_holds_no_more(tmp_path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process's memory is read from /proc")
    sizes = {"num_attention_heads": 25, "hidden_size": 1600, "intermediate_size": 6400, "num_hidden_layers": 1}
    small = InternViT(CONFIG)
    large = InternViT(CONFIG.replace(**sizes), dtype=torch.bfloat16)
    small.save_pretrained(tmp_path / "small")
    large.save_pretrained(tmp_path / "large")
    total, largest = sum(p.nbytes for p in large.parameters()), max(p.nbytes for p in large.parameters())
    for peak, part in run_ranks(4, peak_of_loading, str(tmp_path)):
        print(f"{peak / 2**20:.0f} MiB at the peak, a part of {part / 2**20:.0f} of {total / 2**20:.0f}")
        assert peak <= part + largest
        assert part < 0.35 * total
