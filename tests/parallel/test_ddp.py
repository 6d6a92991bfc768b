"""DistributedDataParallel around an InternViT: gradients of one process, checkpoints of plain names."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from internvit import InternViT
from internvit.numerics import relative_error
from internvit.parallel import load_checkpoint, save_checkpoint, save_pretrained
from tests.parallel.test_tensor_parallel import TINY, whole
from tests.support.models import images
from tests.support.ranks import run_ranks

CONFIG = TINY["4 heads, QK-norm, bias"]


def loss(model: nn.Module, pixels: list[Tensor]) -> Tensor:
    """The mean over images, which have one size."""
    return torch.stack([tokens.square().mean() for tokens in model(pixels).last_hidden_state]).mean()


def check_lists(seed: int) -> None:
    """static_graph=True reduces gradients of those tensors alone that it finds in what forward returns."""
    torch.manual_seed(seed)
    pixels = list(images(CONFIG, 2 * dist.get_world_size()))
    plain = whole(CONFIG, seed).train()
    loss(plain, pixels).backward()
    for settings in ({}, {"static_graph": True}, {"find_unused_parameters": True}):
        model = DistributedDataParallel(whole(CONFIG, seed).train(), **settings)
        for _ in range(2):  # the first step of a static graph is another one
            model.zero_grad()
            loss(model, pixels[2 * dist.get_rank() :][:2]).backward()
            for name, parameter in plain.named_parameters():
                ours = model.module.get_parameter(name).grad
                assert (ours - parameter.grad).norm() <= 1e-5 * parameter.grad.norm() + 1e-7, (name, settings)


def check_checkpoints(seed: int, folder: str) -> None:
    wrapped = DistributedDataParallel(torch.compile(whole(CONFIG, seed), backend="eager"))
    save_checkpoint(wrapped, f"{folder}/ddp")
    save_pretrained(wrapped, f"{folder}/plain")
    expected = whole(CONFIG, seed).state_dict()
    plain = whole(CONFIG, seed + 1)
    load_checkpoint(plain, f"{folder}/ddp")
    for model in (plain, InternViT.from_pretrained(f"{folder}/plain")):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match=r"ddp: does not fit the model: .*layers\.[0-9]"):
        load_checkpoint(InternViT(CONFIG.replace(num_hidden_layers=5)), f"{folder}/ddp")
    error, message = (
        (FileExistsError, "holds weights") if dist.get_rank() == 0 else (RuntimeError, "rank 0 raised File")
    )
    with pytest.raises(error, match=message):
        save_pretrained(wrapped, f"{folder}/plain")
    dist.barrier()


def check_all(seed: int, folder: str) -> None:
    check_lists(seed)
    check_checkpoints(seed, folder)


def test_lists_of_images_and_checkpoints(seed, tmp_path) -> None:
    run_ranks(2, check_all, seed, str(tmp_path))


def test_an_optimizer_resumes_beside_gradients(seed, tmp_path: Path) -> None:
    """The moments are read although a parameter has a gradient, which stays."""
    pixels = images(CONFIG, 1)

    def training(number: int) -> tuple[InternViT, torch.optim.Optimizer]:
        model = whole(CONFIG, number).train()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(pixels).last_hidden_state.square().mean().backward()
        optimizer.step()

    model, optimizer = training(seed)
    step(model, optimizer)
    save_checkpoint(model, tmp_path, optimizer)
    resumed, other = training(seed + 1)
    resumed(pixels).last_hidden_state.square().mean().backward()
    gradient = resumed.encoder.layers[0].ls1.grad.clone()
    load_checkpoint(resumed, tmp_path, other)
    assert torch.equal(resumed.encoder.layers[0].ls1.grad, gradient)
    step(model, optimizer)
    step(resumed, other)
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))
    assert relative_error(model.encoder.layers[0].ls1, whole(CONFIG, seed).encoder.layers[0].ls1) > 0
