"""Checkpoints by torch.distributed.checkpoint, under a plain InternViT's names and shapes.

What is written does not depend on the ranks: a checkpoint of 2 ranks loads on 8, with FSDP2 or without, and
`torch.distributed.checkpoint.load` reads it into the state dict of a plain `InternViT`.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel

from internvit.checkpoint.save import save_pretrained as save_plain
from internvit.model.vit import InternViT
from internvit.parallel.load import checkpoint_folder
from internvit.parallel.plan import TensorParallelPlan
from internvit.parallel.shards import Shard, full_parameters, plan_of, shard

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def _return_itself(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
        return args[0]
    raise NotImplementedError(f"{func}: a part of a checkpoint is no tensor to compute with")


class _StoredShard(Tensor):
    """A rank's part of a parameter as torch.distributed.checkpoint reads and writes it: in the plain one's coordinates.

    Source: the protocol of torch.distributed.tensor._shards_wrapper.LocalShardsWrapper.
    """

    part: Shard

    @staticmethod
    def __new__(cls, part: Shard) -> "_StoredShard":
        made = torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.local.dtype, device=part.local.device)
        made.part = part
        return made

    __torch_dispatch__: Any = classmethod(_return_itself)

    def __create_write_items__(self, fqn: str, tensor: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(region.offsets)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes)),
                    properties=TensorProperties.create_from_tensor(self.part.local),
                    size=torch.Size(self.part.shape),
                ),
            )
            for region in self.part.regions
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes)) for region in self.part.regions
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for region in self.part.regions:
            if index.offset == torch.Size(region.offsets):
                return self.part.local[region.local_index]
        raise ValueError(f"{index.fqn}: no part at {index.offset} on this rank")


def save_checkpoint(
    model: nn.Module, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Writes parameters, and an optimizer's state, by `torch.distributed.checkpoint`; each rank writes its part.

    Args:
        model: with an `InternViT` inside, split by `parallelize`, wrapped by FSDP2, both or neither; or around that
            `DistributedDataParallel` or `torch.compile`, whose names are left out.
        folder: made if it is not there; one process must not read it meanwhile.
        optimizer: of the model's parameters.

    Raises:
        FileExistsError: the folder has a checkpoint.
    """
    if (Path(folder) / ".metadata").exists():
        raise FileExistsError(f"{folder}: holds a checkpoint; give another folder")
    _barrier()  # no rank looks for one that another has begun to write
    dcp.save(_stored(_state(model, optimizer), plan_of(model)), checkpoint_id=str(folder))


def load_checkpoint(
    model: nn.Module, folder: str | os.PathLike[str], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Reads what `save_checkpoint` has written, on any number of ranks, into a model and its optimizer.

    Args:
        model: as for `save_checkpoint`, of the same architecture.
        folder: of the checkpoint.
        optimizer: of the same kind and parameters.

    Raises:
        ValueError: no checkpoint, or one of another architecture.
    """
    path = checkpoint_folder(folder)
    state = _state(model, optimizer)
    stored = _stored(state, plan_of(model))
    try:
        dcp.load(stored, checkpoint_id=str(path))
    except CheckpointException as error:  # a BaseException, with a traceback of each rank as its text
        first = next(iter(error.failures.values()))[0]
        raise ValueError(f"{folder}: does not fit the model: {first}") from error
    if optimizer is not None:
        # Tensors were read into the state's own memory; numbers, such as learning rates, come back in `stored`.
        names = [name for name in state if name.startswith("optimizer.")]
        read = {name: state[name] if isinstance(stored[name], Tensor) else stored[name] for name in names}
        flat = {name.removeprefix("optimizer."): value for name, value in read.items()}
        with _gradients_aside(optimizer):
            set_optimizer_state_dict(model, optimizer, flat, options=_FLAT)


def save_pretrained(model: nn.Module, folder: str | os.PathLike[str], **settings: Any) -> None:
    """Writes a plain checkpoint of a split or wrapped InternViT: `InternViT.save_pretrained` with its `settings`.

    Rank 0 gathers the weights on its CPU, a parameter at a time, and writes; every rank must call.

    Raises:
        ValueError, FileExistsError, OSError: as for `InternViT.save_pretrained`, on rank 0.
        RuntimeError: on the others, when rank 0 has raised.
    """
    while isinstance(model, DistributedDataParallel) or "_orig_mod" in model._modules:  # torch.compile's
        model = model.get_submodule("module" if isinstance(model, DistributedDataParallel) else "_orig_mod")
    tensors = {name: tensor for name, tensor in full_parameters(model) if tensor is not None}
    if not dist.is_initialized():
        _save_plain(model, tensors, folder, settings)
        return
    failure: list[str | None] = [None]
    try:
        if tensors:
            _save_plain(model, tensors, folder, settings)
    except BaseException as error:
        failure = [f"{type(error).__name__}: {error}"]
        raise
    finally:  # the others wait for it
        dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise RuntimeError(f"save_pretrained: rank 0 raised {failure[0]}")


def _save_plain(model: nn.Module, tensors: dict[str, Tensor], folder: Any, settings: dict[str, Any]) -> None:
    config: Any = model.config
    plain = InternViT(config, device="meta")
    plain.load_state_dict(tensors, assign=True)
    save_plain(plain, folder, **settings)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    if optimizer is not None:
        with _gradients_aside(optimizer):
            flat = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        state |= {f"optimizer.{name}": value for name, value in flat.items()}
    return state


@contextlib.contextmanager
def _gradients_aside(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """PyTorch makes no state for an optimizer that has not stepped while a parameter has a gradient, so that none
    would be read."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient


def _stored(state: Mapping[str, Any], plan: TensorParallelPlan | None) -> dict[str, Any]:
    """The state with its tensors as `_StoredShard`s; numbers and an optimizer's step stay."""

    def stored(key: str, value: Any) -> Any:
        is_sharded = isinstance(value, Tensor) and value.dim() > 0
        return _StoredShard(shard(_parameter_name(key), value, plan)) if is_sharded else value

    return {key: stored(key, value) for key, value in state.items()}


def _parameter_name(key: str) -> str:
    """The parameter that a key of the state belongs to: "optimizer.state.NAME.exp_avg" is NAME's."""
    if key.startswith("optimizer.state."):
        return key.removeprefix("optimizer.state.").rpartition(".")[0]
    return key


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
