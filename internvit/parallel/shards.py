"""What a rank stores of a plain InternViT's parameters, whatever tensor parallelism and FSDP2 have made of them."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from internvit.parallel.layers import TensorParallelLayer
from internvit.parallel.plan import ParameterSplit, Region, TensorParallelPlan


class Shard(NamedTuple):
    """A rank's part of one parameter.

    Attributes:
        shape: of the parameter in a plain InternViT.
        local: what this rank stores, padding included.
        regions: what it stores of the parameter, and where.
    """

    shape: tuple[int, ...]
    local: Tensor
    regions: list[Region]


def plan_of(model: nn.Module) -> TensorParallelPlan | None:
    """How the InternViT in `model` was split by `parallelize`; None if it was not.

    Raises:
        ValueError: several split InternViTs.
    """
    plans = {module.plan for module in model.modules() if isinstance(module, TensorParallelLayer)}
    if len(plans) > 1:
        raise ValueError("model: expected one tensor-parallel InternViT in it, got several")
    return plans.pop() if plans else None


def shard(name: str, tensor: Tensor, plan: TensorParallelPlan | None) -> Shard:
    """This rank's part of the tensor of parameter `name`: the parameter, its gradient or an optimizer's moment."""
    split = _split(name, tensor, plan)
    if not isinstance(tensor, DTensor):
        return Shard(split.shape, tensor, split.regions([0] * tensor.dim(), tensor.shape))
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Shard(split.shape, tensor.to_local(), split.regions(offsets, sizes))


def _split(name: str, tensor: Tensor, plan: TensorParallelPlan | None) -> ParameterSplit:
    split = ParameterSplit(tuple(tensor.shape)) if plan is None else plan.split(name, tensor.shape)
    if tuple(tensor.shape) != split.stored_shape():
        raise ValueError(f"{name}: expected the shape {split.stored_shape()} of its plan, got {tuple(tensor.shape)}")
    return split


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """Each parameter as a plain InternViT has it, on the CPU of rank 0 of the default group; None on the others.

    One at a time: rank 0 holds one of them beside what it keeps. Every rank must run the whole iteration.
    """
    plan = plan_of(model)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for name, tensor in model.state_dict().items():
        split = _split(name, tensor, plan)
        stored = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not first:
            yield name, None
        elif split.dim is None:
            yield name, stored.detach().cpu()
        else:
            full = stored.new_empty(split.shape, device="cpu")
            for rank in range(len(split.sizes)):
                narrowed = stored.narrow(split.stored_dim or 0, rank * split.padded, split.padded)
                for region in split.rank_regions(rank):
                    full[region.source].copy_(narrowed[region.local_index])
            yield name, full
