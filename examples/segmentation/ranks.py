"""Several processes that train one network, as torchrun starts them; without it, one.

The parameters are sharded by FSDP2. A micro-batch goes to the rank of its number, so that the steps are those of one
process; DropPath and dropout draw from a generator of each rank. Checkpoints are one file of whole tensors, written by
rank 0: they load on any number of ranks, and continue to the bit on the same number.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from checkpoints import rng_state, set_rng_state
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
_READ = StateDictOptions(full_state_dict=True, strict=False)


class Ranks:
    """The processes of a run.

    Args:
        device: that of --device; of several CUDA devices each rank takes its own.

    Attributes:
        count, rank: of this process among them.
        device: of this process.
    """

    def __init__(self, device: str) -> None:
        self.count, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.device = device
        if self.count == 1:
            return
        if device == "cuda":
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)
        self._started = not dist.is_initialized()
        if self._started:
            dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")

    def close(self) -> None:
        """Ends the process group that this object has started; after an error torchrun ends the processes."""
        if self.count > 1 and self._started:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def shard(self, model: nn.Module) -> nn.Module:
        """The model with its trained parameters sharded; frozen ones are whole on every rank."""
        if self.count == 1:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        from internvit.parallel import shard_blocks

        mesh = init_device_mesh(torch.device(self.device).type, (self.count,))
        frozen = {parameter for parameter in model.parameters() if not parameter.requires_grad}
        if frozen:
            fully_shard(model, mesh=mesh, ignored_params=frozen)
        else:
            shard_blocks(model, mesh)
        register_fsdp_forward_method(model, "loss")
        return model

    def seed(self, seed: int) -> None:
        """Gives the generators of ranks other than the first another seed."""
        if not self.first:
            torch.manual_seed(seed + 1_000_003 * self.rank)

    def mean(self, value: float) -> float:
        """The mean of the ranks' values."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.count

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What a checkpoint has of model, optimizer and generators: whole on the first rank. All ranks must call."""
        if self.count > 1:
            for buffer in model.buffers():  # of BatchNorm: each rank has seen other images
                dist.broadcast(buffer, 0)
        generators: list[Any] = [rng_state()]
        if self.count > 1:
            generators = [None] * self.count
            dist.all_gather_object(generators, rng_state())
        return {
            "model": get_model_state_dict(model, options=_WHOLE),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=_WHOLE),
            "rng": {str(rank): state for rank, state in enumerate(generators)},
        }

    def load(self, state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Reads a checkpoint's state; with another number of ranks the generators go on from their seeds.

        Raises:
            ValueError, KeyError: another optimizer's state, or none of the generators.
        """
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        stored = {name for group in state["optimizer"]["param_groups"] for name in group["params"]}
        if stored != trained:
            raise ValueError(
                f"optimizer: expected {len(trained)} parameters, such as {min(trained)}, got {len(stored)}"
            )
        if not state["rng"]:
            raise ValueError("rng: expected the state of each rank's generators, got nothing")
        set_model_state_dict(model, state["model"], options=_READ)
        set_optimizer_state_dict(model, optimizer, state["optimizer"], options=_READ)
        if len(state["rng"]) == self.count:
            set_rng_state(state["rng"][str(self.rank)])
