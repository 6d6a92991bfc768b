"""`parallelize`: an InternViT whose ranks share its heads and hidden units."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from internvit.config import InternViTConfig
from internvit.model.block import is_unmodified
from internvit.model.embeddings import Embeddings
from internvit.model.hooks import refuse_global_hooks
from internvit.parallel.group import RankGroup
from internvit.parallel.layers import TensorParallelEmbeddings, split_layer
from internvit.parallel.plan import ParameterSplit, tensor_parallel_plan

Model = TypeVar("Model", bound=nn.Module)


def parallelize(model: Model, mesh: DeviceMesh, *, src_data_rank: int | None = 0) -> Model:
    """Splits a model over the ranks of `mesh`, in place: tensor parallelism.

    Parameters become DTensors under their names: qkv and fc1 split by columns, along heads and hidden units, proj and
    fc2 by rows, all others on every rank (`internvit.parallel.tensor_parallel_plan` prints it). The call, the hidden
    states and the gradients stay those of the whole model, on every rank. Each block sums [B, N, C] over the ranks
    twice forward and twice backward, and with QK-norm two float32 numbers a token in each direction.

    Every rank must call the model with the same images, in the same order. DropPath takes the first rank's draws.
    Checkpointing, `residual_dtype`, `optimize_for_inference` and `torch.nn.utils.clip_grad_norm_` work; LayerScale is
    not folded into the split Linears, and their weights are not packed on CPUs. An all-reduce may add in another order
    for another batch, so an image's last bits may differ. `internvit.parallel.save_checkpoint` writes plain InternViT's
    parameters.

    Args:
        model: an `InternViT` or `InternViTBackbone` without hooks or adapters, on the mesh's type of device, or on the
            meta device. A backbone's pyramid stays as it is, whole on every rank.
        mesh: one dimension of a DeviceMesh, such as `mesh["tp"]`.
        src_data_rank: the rank in `mesh` whose weights all take, as in torch's `distribute_tensor`; None keeps each
            rank's own, which must then be the same.

    Returns:
        The model.

    Raises:
        ValueError: another model, a layer with hooks, adapters or replaced parts, a mesh of several dimensions, more
            ranks than heads, or a model that is split already.

    Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053; QK-norm over all heads is InternAttention's in
        OpenGVLab's modeling_intern_vit.py.

    Example, under `torchrun --nproc-per-node 4`:
        model = internvit.parallel.parallelize(model, init_device_mesh("cuda", (4,)))
    """
    config = _check(model, mesh)
    group = RankGroup(mesh)
    plan = tensor_parallel_plan(config, group.size)
    for prefix in ("embeddings", "encoder"):
        for name, parameter in list(model.get_submodule(prefix).named_parameters(prefix)):
            if src_data_rank is not None and not parameter.is_meta and group.size > 1:
                dist.broadcast(parameter.data, group=mesh.get_group(), group_src=src_data_rank)
            split = plan.split(name, parameter.shape)
            made = nn.Parameter(_distribute(parameter.detach(), split, group), requires_grad=parameter.requires_grad)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, made)
    model.get_submodule("embeddings").__class__ = TensorParallelEmbeddings
    for layer in model.get_submodule("encoder.layers").children():
        split_layer(layer, plan, group)
    return model


def _distribute(parameter: Tensor, split: ParameterSplit, group: RankGroup) -> DTensor:
    """The DTensor of a parameter that is whole on this rank; padding is zero, and so is its gradient."""
    if split.dim is None:
        return DTensor.from_local(parameter, group.mesh, [Replicate()], run_check=False)
    stored = parameter.new_zeros(split.stored_shape(1))
    for region in split.rank_regions(group.rank):
        stored[region.local_index].copy_(parameter[region.source])
    return DTensor.from_local(stored, group.mesh, [Shard(split.stored_dim or 0)], run_check=False)


def _check(model: nn.Module, mesh: DeviceMesh) -> InternViTConfig:
    config, embeddings = getattr(model, "config", None), getattr(model, "embeddings", None)
    if not isinstance(config, InternViTConfig) or not isinstance(embeddings, Embeddings):
        raise ValueError(f"parallelize: model must be an InternViT or InternViTBackbone, got {type(model).__name__}")
    if not isinstance(mesh, DeviceMesh) or mesh.ndim != 1:
        got = f"{mesh.ndim} dimensions" if isinstance(mesh, DeviceMesh) else type(mesh).__name__
        raise ValueError(f"parallelize: mesh must be one dimension of a DeviceMesh, such as mesh['tp'], got {got}")
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "parallelize: model must have plain parameters, got DTensors; call it once, before fully_shard"
        )
    refuse_global_hooks("parallelize")
    odd = [i for i, layer in enumerate(model.get_submodule("encoder.layers").children()) if not is_unmodified(layer)]
    if odd:
        raise ValueError(f"parallelize: layers {odd} have hooks, adapters or replaced parts; add them to no layer")
    device = embeddings.position_embedding.device
    if device.type not in (mesh.device_type, "meta"):
        raise ValueError(f"parallelize: model must be on {mesh.device_type}, the mesh's device, got {device}")
    return config
