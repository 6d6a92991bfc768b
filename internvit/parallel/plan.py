"""How tensor parallelism lays InternViT's parameters on ranks; without torch.distributed, as the planner uses it too.

qkv and fc1 are split by columns (rows of their weights), along heads and along the MLP's hidden units; proj and fc2 by
rows (columns of their weights). All else is on every rank. Heads that do not divide are split unevenly, the first ranks
taking one more: 25 over 4 are 7 + 6 + 6 + 6.

DTensor's `Shard` splits as torch.chunk does (25 over 4 would be 7 + 7 + 7 + 4, and 4 + ... + 4 + 1 + 0 over 8), and
computes offsets by that rule. So a split parameter is stored with every rank's part padded to the largest one, and its
DTensor is even: 4 * 7 heads, of which a rank with 6 uses 6. The largest part, which sets the time and the memory, is
the same with and without padding. qkv is stored as [3, heads * D, C], so that one `Shard(1)` splits q, k and v alike.
`ParameterSplit.regions` maps what is stored to the parameter of a plain InternViT, for loading and saving.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from internvit.config import InternViTConfig

_GRANULE = 16
"""Hidden units of the MLP that stay together where they can: GEMMs like multiples of 16."""
_BLOCK_NAME = re.compile(r"(?:^|\.)encoder\.layers\.\d+\.(.+)$")


class Region(NamedTuple):
    """A part of a parameter, and where a rank stores it.

    Attributes:
        offsets, sizes: of the part in a plain InternViT's parameter.
        local_index: of the part in the local tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    local_index: tuple[Any, ...]

    @property
    def source(self) -> tuple[slice, ...]:
        """The index of the part in the plain parameter."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))


@dataclass(frozen=True)
class ParameterSplit:
    """How one parameter is split.

    Attributes:
        shape: of the parameter in a plain InternViT.
        dim: that is split; None for a parameter that every rank has.
        sizes: of each rank's part along `dim`, in each of the blocks.
        blocks: 3 for the packed qkv, of which q, k and v are split alike; else 1.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    sizes: tuple[int, ...] = ()
    blocks: int = 1

    @property
    def padded(self) -> int:
        """The length that is stored of every rank's part: the largest one."""
        return max(self.sizes)

    @property
    def stored_dim(self) -> int | None:
        """The dimension of the stored parameter that `Shard` splits."""
        return self.dim if self.blocks == 1 else 1

    def stored_shape(self, ranks: int | None = None) -> tuple[int, ...]:
        """The shape of the DTensor; of `ranks` parts of it, 1 for the local tensor."""
        if self.dim is None:
            return self.shape
        length = self.padded * (len(self.sizes) if ranks is None else ranks)
        if self.blocks > 1:
            return (self.blocks, length, *self.shape[1:])
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def regions(self, offsets: Sequence[int], sizes: Sequence[int]) -> list[Region]:
        """What a box of the stored parameter, inside one rank's part, holds of the parameter; padding is left out."""
        whole = tuple(slice(0, size) for size in sizes)
        if self.dim is None:
            return [Region(tuple(offsets), tuple(sizes), whole)] if math.prod(sizes) else []
        split = self.stored_dim or 0
        if not math.prod(sizes):
            return []
        rank, first = divmod(offsets[split], self.padded)
        count = min(first + sizes[split], self.sizes[rank]) - first
        if count <= 0:
            return []
        start = sum(self.sizes[:rank]) + first
        if self.blocks == 1:
            return [
                Region(
                    (*offsets[:split], start, *offsets[split + 1 :]),
                    (*sizes[:split], count, *sizes[split + 1 :]),
                    (*whole[:split], slice(0, count), *whole[split + 1 :]),
                )
            ]
        return [
            Region(
                (block * sum(self.sizes) + start, *offsets[2:]),
                (count, *sizes[2:]),
                (block - offsets[0], slice(0, count), *whole[2:]),
            )
            for block in range(offsets[0], offsets[0] + sizes[0])
        ]

    def rank_regions(self, rank: int) -> list[Region]:
        """What the local tensor of a rank holds of the parameter."""
        local = self.stored_shape(1)
        offsets = [0] * len(local)
        if self.stored_dim is not None:
            offsets[self.stored_dim] = rank * self.padded
        return self.regions(offsets, local)


@dataclass(frozen=True)
class TensorParallelPlan:
    """How an InternViT's parameters are split over ranks; `str` of it is a table.

    Attributes:
        config: of the model.
        heads: of each rank.
        hidden: units of the MLP of each rank.
        splits: of the parameters of a block, by name; all others are on every rank.
    """

    config: InternViTConfig
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    splits: dict[str, ParameterSplit] = field(hash=False)

    @property
    def ranks(self) -> int:
        return len(self.heads)

    def split(self, name: str, shape: Sequence[int]) -> ParameterSplit:
        """How the parameter `name`, of any module around the InternViT, is split; `shape` is that of one not split."""
        match = _BLOCK_NAME.search(name)
        return (self.splits.get(match[1]) if match else None) or ParameterSplit(tuple(shape))

    def local_numel(self) -> int:
        """Elements that each rank stores, padding included."""
        shapes = self.config.parameter_shapes()
        return sum(math.prod(self.split(name, shape).stored_shape(1)) for name, shape in shapes.items())

    def __str__(self) -> str:
        lines = [f"tensor parallel over {self.ranks} ranks", f"{'parameter':<20}{'placement':<14}each rank's part"]
        for name, shape in self.config.parameter_shapes().items():
            match = re.match(r"encoder\.layers\.0\.(.+)$", name)
            if match is None:
                continue
            split = self.split(name, shape)
            placement = "Replicate()" if split.dim is None else f"Shard(dim={split.stored_dim})"
            sizes = "whole" if split.dim is None else f"{split.blocks} x " * (split.blocks > 1) + _listed(split.sizes)
            lines.append(f"{match[1]:<20}{placement:<14}{sizes}")
        return "\n".join([*lines, f"{'heads':<34}{_listed(self.heads)}", "all other parameters: Replicate()"])


def _listed(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))


def balanced(units: int, ranks: int) -> tuple[int, ...]:
    """`units` over `ranks`, the first ones taking one more: 25 over 4 are (7, 6, 6, 6)."""
    return tuple(units // ranks + (rank < units % ranks) for rank in range(ranks))


def tensor_parallel_plan(config: InternViTConfig, ranks: int) -> TensorParallelPlan:
    """How `parallelize` splits a model of `config` over `ranks`.

    Raises:
        ValueError: fewer than one rank, or more ranks than heads.
    """
    if not isinstance(ranks, int) or not 1 <= ranks <= config.num_attention_heads:
        raise ValueError(
            f"tensor_parallel_plan: ranks must be from 1 to the {config.num_attention_heads} heads, got {ranks!r}"
        )
    width, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    granule = math.gcd(inner, _GRANULE)
    if inner // granule < ranks:
        granule = 1
    heads = balanced(config.num_attention_heads, ranks)
    rows = tuple(count * head_dim for count in heads)
    hidden = tuple(count * granule for count in balanced(inner // granule, ranks))
    splits = {
        "attn.qkv.weight": ParameterSplit((3 * width, width), 0, rows, blocks=3),
        "attn.qkv.bias": ParameterSplit((3 * width,), 0, rows, blocks=3),
        "attn.q_norm.weight": ParameterSplit((width,), 0, rows),
        "attn.k_norm.weight": ParameterSplit((width,), 0, rows),
        "attn.proj.weight": ParameterSplit((width, width), 1, rows),
        "mlp.fc1.weight": ParameterSplit((inner, width), 0, hidden),
        "mlp.fc1.bias": ParameterSplit((inner,), 0, hidden),
        "mlp.fc2.weight": ParameterSplit((width, inner), 1, hidden),
    }
    return TensorParallelPlan(config, heads, hidden, splits)
