"""FSDP2 by block: torch's `fully_shard` of each block and of what is left, beside tensor parallelism or alone."""

import dataclasses
from typing import Any, TypeVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from internvit.model.block import InternViTLayer
from internvit.model.hooks import has_own_hooks

Model = TypeVar("Model", bound=nn.Module)


def shard_blocks(model: Model, mesh: DeviceMesh, **settings: Any) -> Model:
    """Shards every block of the InternViT in `model`, and then the rest of it, by FSDP2, in place.

    The ranks of `mesh` keep a part of each parameter, its gradient and its optimizer state; a block's parameters are
    gathered while it runs. All checkpointing modes, `param_groups_layer_decay` and `clip_grad_norm_` work; a block
    passes its last branch on to the next, which adds it in the pass of its own first norm, as an unwrapped model does.

    Args:
        model: an `InternViT`, a backbone, or a model around one; after `internvit.parallel.parallelize` for both.
        mesh: of the data-parallel ranks, such as `mesh["dp"]`; with two dimensions, (replicate, shard).
        settings: mp_policy, reshard_after_forward, offload_policy and ignored_params, of
            `torch.distributed.fsdp.fully_shard`. The policy's casts of inputs and outputs are the model's: between
            blocks the residual stream keeps its dtype.

    Returns:
        The model.

    Raises:
        ValueError: no InternViT in it.

    Example, under `torchrun --nproc-per-node 8`:
        model = internvit.parallel.shard_blocks(model, init_device_mesh("cuda", (8,)), reshard_after_forward=False)
    """
    blocks = [module for module in model.modules() if isinstance(module, InternViTLayer)]
    if not blocks:
        raise ValueError(f"shard_blocks: model must hold an InternViT, got {type(model).__name__}")
    ranks = mesh.size(mesh.ndim - 1)

    def placement(parameter: nn.Parameter) -> Shard | None:
        """The packed qkv of a tensor-parallel block is [3, h * D, C]: 3 does not divide well, C does."""
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        divides = [dim for dim in range(local.dim()) if local.shape[dim] % ranks == 0]
        stacked = local.dim() in (2, 3) and local.shape[0] == 3 and divides
        return Shard(divides[-1]) if stacked else None

    policy = settings.get("mp_policy", MixedPrecisionPolicy())
    of_blocks = settings | {"mp_policy": dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None)}
    for block in blocks:
        unwrapped = not has_own_hooks(block)
        fully_shard(block, mesh=mesh, shard_placement_fn=placement, **of_blocks)
        if unwrapped:
            block.wrapping_hooks = frozenset({*block._forward_hooks, *block._forward_pre_hooks})
    fully_shard(model, mesh=mesh, **settings)
    return model
