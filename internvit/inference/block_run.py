"""How an optimised model runs its layers, on the batch, on packed images, or on one image at a time."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from internvit.inference.fp8 import fp8_parts
from internvit.inference.packed_block import PackedBlock
from internvit.model.block import is_unmodified
from internvit.model.fused_block import BlockParts, Norm
from internvit.model.packed import split
from internvit.ops.core.sequences import Sequences


class Pieces:
    """What goes through the blocks at once: all, or one image after the other.

    Packed images are batches of one where they go one by one, and the layers that are called get them packed.

    Attributes:
        sequences: of packed images, for the layers.
    """

    def __init__(self, x: Tensor, sequences: Sequences | None, alone: bool) -> None:
        self.sequences = sequences
        # The library's own GEMMs have one order of summation for any number of rows, and take all images at once.
        self.alone = alone if sequences is not None else alone and x.shape[0] > 1

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.alone:
            return (x,)
        return x.split(1) if self.sequences is None else tuple(image[None] for image in split(x, self.sequences))

    def join(self, states: list[tuple[Tensor, Any]]) -> Tensor:
        if not self.alone:
            return states[0][0]
        return torch.cat([piece if self.sequences is None else piece[0] for piece, _ in states])


class BlockRun:
    """How one layer runs in this forward: by its parts, or, where something in it was modified, by calling it.

    A layer that is called gets the residual stream in the dtype that the model gives it: hooks, adapters and replaced
    parts may know no other.
    """

    def __init__(
        self,
        layer: Any,
        block: PackedBlock | None,
        model_dtype: torch.dtype,
        float8: Collection[str],
        images: Pieces,
    ) -> None:
        self.layer, self.model_dtype, self.sequences = layer, model_dtype, images.sequences
        sequences = None if images.alone else images.sequences
        if float8 and is_unmodified(layer):
            self.parts: BlockParts | None = fp8_parts(layer, float8, sequences)
        elif block is not None:
            self.parts = block.parts(layer, sequences)
        else:
            self.parts = layer.parts(sequences) if is_unmodified(layer, quantised=True) else None
        norm = None if self.parts is None else self.parts.norm1
        self.first_norm = norm if isinstance(norm, Norm) else None

    def call(self, x: Tensor) -> Tensor:
        x, dtype = x.to(self.model_dtype), x.dtype
        packed = {} if self.sequences is None else {"sequences": self.sequences}
        return self.layer(x, **packed).to(dtype)
