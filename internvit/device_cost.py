"""What InternViT costs on several devices: bytes that each holds, and bytes that they send each other for an image.

Three kinds of parallelism, and their products: tensor parallelism (TP) shares each image's heads and hidden units,
FSDP2 the storage of weights, gradients and optimizer, data parallelism (DP) the images. `Collectives` are the tensors
that the ranks' calls get, which tests/parallel/test_traffic.py counts; what a device sends follows by the ring
algorithms of NCCL and gloo: 2 (n - 1) / n of an all-reduce, (n - 1) / n of a reduce-scatter or all-gather.
"""

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from internvit.config import VARIANTS, InternViTConfig
from internvit.cost import DEFAULT_SIZE, TASKS, Cost, cost, preferred_variants, recomputed_flops, tokens_of

FLOPS_PER_BYTE = 2000
"""Operations that a device computes while it sends a byte: 400 TFLOP/s over 200 GB/s, assumed, of NVLink's order."""


class Collectives(NamedTuple):
    """Bytes of the tensors that one device's collectives get or give, whichever is larger."""

    allreduce: int = 0
    reduce_scatter: int = 0
    allgather: int = 0
    broadcast: int = 0

    def sent(self, ranks: int) -> float:
        """Bytes that each of `ranks` devices sends."""
        ring = (ranks - 1) / ranks
        return ring * (2 * self.allreduce + self.reduce_scatter + self.allgather + self.broadcast)


def tensor_parallel_traffic(
    config: InternViTConfig, ranks: int, tokens: int, batch: int, dtype: torch.dtype, training: bool, mode: str = "none"
) -> Collectives:
    """What a forward, or a forward and backward, of a tensor-parallel model exchanges; `mode` is of checkpointing.

    Each block sums [batch, tokens, C] over the ranks twice forward, twice backward, and twice more where proj and the
    MLP are recomputed; with QK-norm [2, batch, tokens] in float32 once, once, and once more where attention is
    recomputed. Sums of 16-bit tensors are a reduce-scatter in float32 and an all-gather, with rows padded to a
    multiple of the ranks. DropPath sends its draw, one float32 an image, from the first rank.
    """
    if ranks == 1:
        return Collectives()
    rows, layers = batch * tokens, config.num_hidden_layers
    again = training and mode != "none"
    sums = layers * ((2 + 2 * again) + 2 * training)
    statistics = layers * (1 + training + (training and mode == "block")) if config.qk_normalization else 0
    padded = -(-rows // ranks) * ranks * config.hidden_size
    wide = dtype.itemsize > 2
    draws = sum(rate > 0 for rate in config.drop_path_rates()) * 2 * (1 + again) if training else 0
    return Collectives(
        allreduce=statistics * 2 * rows * max(4, dtype.itemsize)
        + (sums * rows * config.hidden_size * dtype.itemsize if wide else 0),
        reduce_scatter=0 if wide else sums * padded * 4,
        allgather=0 if wide else sums * padded * dtype.itemsize,
        broadcast=draws * batch * 4,
    )


def fsdp_traffic(
    config: InternViTConfig,
    ranks: int,
    tensor_ranks: int,
    dtype: torch.dtype,
    training: bool,
    gradients: int | None = None,
) -> Collectives:
    """What FSDP2 by block (`internvit.parallel.shard_blocks`) gathers and reduces in a forward, or in a step.

    A block's parameters are gathered for its forward and again for its backward, the embeddings' once; gradients are
    reduce-scattered. Parts are padded to equal sizes.
    """
    if ranks == 1:
        return Collectives()
    block, rest = (_padded_numel(config, tensor_ranks, ranks, blocks) for blocks in (True, False))
    gathered = ((1 + training) * block + rest) * dtype.itemsize
    reduced = (block + rest) * dtype.itemsize if training else 0
    return Collectives(reduce_scatter=reduced, allgather=gathered)


def _padded_numel(config: InternViTConfig, tensor_ranks: int, ranks: int, blocks: bool) -> int:
    """Elements that are gathered of all blocks, or of the embeddings, of one tensor-parallel rank."""
    from internvit.parallel.plan import tensor_parallel_plan

    plan, total = tensor_parallel_plan(config, tensor_ranks), 0
    for name, shape in config.parameter_shapes().items():
        if name.startswith("encoder.") != blocks:
            continue
        local = plan.split(name, shape).stored_shape(1) if tensor_ranks > 1 else shape
        divides = any(n % ranks == 0 for n in local)
        stacked = len(local) in (2, 3) and local[0] == 3 and divides
        total += math.prod(local) if stacked else -(-local[0] // ranks) * ranks * math.prod(local[1:])
    return total


@dataclass(frozen=True)
class DeviceCost:
    """What one device holds under one layout, and what all of them send.

    Attributes:
        variant: of the model.
        tensor_parallel, fsdp, data_parallel: ranks; their product is the number of devices.
        checkpointing: that makes it fit, "none", "selective" or "block".
        weights, optimizer, activations, gathered: bytes on the device with the most; `gathered` are blocks that FSDP2
            has put together.
        total: of these.
        sent: bytes that all devices send, over the images of a step.
        images: of a step.
        fits: whether the total is within the memory there is.
    """

    variant: str
    tensor_parallel: int
    fsdp: int
    data_parallel: int
    checkpointing: str
    weights: int
    optimizer: int
    activations: int
    gathered: int
    total: int
    sent: int
    images: int
    fits: bool

    @property
    def layout(self) -> str:
        """Such as "TP 2 x FSDP 4"."""
        kinds = (("TP", self.tensor_parallel), ("FSDP", self.fsdp), ("DP", self.data_parallel))
        return " x ".join(f"{name} {ranks}" for name, ranks in kinds if ranks > 1) or "one device"

    def to_dict(self) -> dict:
        return {**asdict(self), "layout": self.layout}


@dataclass(frozen=True)
class DevicePlan:
    """Every layout of the variants in question, and which to take."""

    costs: list[DeviceCost]
    choice: DeviceCost | None
    why: str

    def to_dict(self) -> dict:
        costs = [c.to_dict() for c in self.costs]
        return {"costs": costs, "choice": self.choice.to_dict() if self.choice else None, "why": self.why}


def device_plan(
    task: str,
    devices: int,
    memory: int,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    train: bool = False,
) -> DevicePlan:
    """Layouts of the task's variants over devices, and the one that fits with the least sent and recomputed an image.

    A byte sent counts as `FLOPS_PER_BYTE` operations; that sending may overlap with computing is left out.

    Args:
        task, size, dtype, train: as for `internvit.cost.plan`.
        devices: how many there are.
        memory: bytes of each.
        batch: images at once of each group of ranks that shares images.

    Raises:
        ValueError: an unknown task, fewer than one device or image, a size off the patch grid.
    """
    if task not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    for name, number in (("devices", devices), ("batch", batch)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    size = size or (DEFAULT_SIZE[task],) * 2
    maps = 4 if task in ("segmentation", "detection") else 0
    costs = [
        layout_cost(VARIANTS[variant], *layout, size, batch, dtype, train, memory, maps)
        for variant in preferred_variants(task, train)
        for layout in layouts(VARIANTS[variant], devices)
    ]
    for variant in preferred_variants(task, train):
        fitting = [c for c in costs if c.variant == variant and c.fits]
        if fitting:
            best = min(fitting, key=lambda c: (_overhead(c, size), c.tensor_parallel))
            why = "the largest variant that fits, and of its layouts the one that sends and recomputes least"
            return DevicePlan(costs, best, why)
    return DevicePlan(costs, None, "none fits; lower --batch or --size, or take more devices")


def _overhead(layout: DeviceCost, size: tuple[int, int]) -> float:
    """What sending and recomputing cost for an image, in floating-point operations."""
    recomputed = recomputed_flops(VARIANTS[layout.variant], size, layout.checkpointing)
    return recomputed + FLOPS_PER_BYTE * layout.sent


def layouts(config: InternViTConfig, devices: int) -> list[tuple[int, int, int]]:
    """(TP, FSDP, DP) whose product is `devices`: TP over a divisor, and one of the others over the rest."""
    found = []
    for tensor_ranks in range(1, min(devices, config.num_attention_heads) + 1):
        rest, remainder = divmod(devices, tensor_ranks)
        if remainder == 0:
            found += [(tensor_ranks, 1, rest)] + ([(tensor_ranks, rest, 1)] if rest > 1 else [])
    return found


def layout_cost(
    config: InternViTConfig,
    tensor_ranks: int,
    fsdp_ranks: int,
    replicas: int,
    size: tuple[int, int],
    batch: int,
    dtype: torch.dtype,
    train: bool,
    memory: int,
    maps: int = 0,
) -> DeviceCost:
    """The cost of one layout, with the least checkpointing that fits."""
    from internvit.parallel.plan import tensor_parallel_plan

    split = tensor_parallel_plan(config, tensor_ranks) if tensor_ranks > 1 else None
    whole = cost(config, size, batch, dtype, maps, split)
    weights, optimizer = -(-whole.weights // fsdp_ranks), -(-whole.optimizer // fsdp_ranks)
    gathered = 0
    if fsdp_ranks > 1:
        block, rest = (_padded_numel(config, tensor_ranks, fsdp_ranks, blocks) for blocks in (True, False))
        block //= config.num_hidden_layers
        # One block runs while the next is gathered; in training its gradients are there, whole, as well.
        gathered = (2 * block + rest + (block if train else 0)) * dtype.itemsize
    fixed = weights + gathered + (optimizer if train else 0)
    mode, activations = _least_checkpointing(whole, train, memory - fixed)
    total = fixed + activations
    tokens = tokens_of(config, size)
    traffic = tensor_parallel_traffic(config, tensor_ranks, tokens, batch, dtype, train, mode).sent(tensor_ranks)
    traffic += fsdp_traffic(config, fsdp_ranks, tensor_ranks, dtype, train).sent(fsdp_ranks)
    if train:
        traffic += Collectives(allreduce=whole.weights).sent(replicas)
    images = batch * fsdp_ranks * replicas
    sent = round(traffic * tensor_ranks * fsdp_ranks * replicas / images)
    return DeviceCost(
        whole.variant,
        tensor_ranks,
        fsdp_ranks,
        replicas,
        mode,
        weights,
        optimizer if train else 0,
        activations,
        gathered,
        total,
        sent,
        images,
        total <= memory,
    )


def _least_checkpointing(whole: Cost, train: bool, room: int) -> tuple[str, int]:
    """The mode that recomputes least within `room` bytes of activations, or the one that keeps least; its bytes."""
    if not train:
        return "none", whole.inference
    modes = (("none", whole.training), ("selective", whole.selective), ("block", whole.checkpointing))
    return next(((mode, kept) for mode, kept in modes if kept <= room), modes[-1])
