"""How an optimised model runs its layers, on the batch, on packed images, or on one image at a time."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from internvit.inference.folded_norms import can_fold, folded_parts
from internvit.inference.fp8 import fp8_parts
from internvit.inference.packed_block import PackedBlock
from internvit.model.attention_summary import AttentionSummary
from internvit.model.block import is_unmodified
from internvit.model.encoder import attention_maps
from internvit.model.fused_block import BlockParts, Norm
from internvit.model.packed import runs_alone, split
from internvit.ops.core.sequences import Sequences


class Pieces:
    """What goes through the blocks at once: everything, or batches of one image.

    Attributes:
        sequences: of packed images that go through the blocks at once.
    """

    def __init__(self, x: Tensor, sequences: Sequences | None, one_image: bool) -> None:
        self._packed = sequences if sequences is not None and runs_alone(x, sequences) else None
        self._alone = one_image and sequences is None and x.shape[0] > 1
        self.sequences = None if self._packed is not None else sequences

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        if self._packed is not None:
            return tuple(image[None] for image in split(x, self._packed))
        return x.split(1) if self._alone else (x,)

    def join(self, states: list[tuple[Tensor, Any]]) -> Tensor:
        if self._packed is not None:
            return torch.cat([piece[0] for piece, _ in states])
        return torch.cat([piece for piece, _ in states]) if self._alone else states[0][0]

    def call(self, run: "BlockRun", states: list[tuple[Tensor, Any]]) -> tuple[Tensor, ...]:
        """The pieces after a layer that is called: with a batch whole, which it has the same bits for."""
        if self._packed is not None:
            return tuple(run.call(piece) for piece, _ in states)
        return self.split(run.call(self.join(states)))


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
        fold_norms: bool = False,
        summary: AttentionSummary | None = None,
    ) -> None:
        self.layer, self.model_dtype, self.sequences, self._summary = layer, model_dtype, images.sequences, summary
        sequences = self.sequences
        if float8 and is_unmodified(layer):
            self.parts: BlockParts | None = fp8_parts(layer, float8, sequences, summary)
        elif block is not None:
            self.parts = block.parts(layer, sequences, summary)
        elif fold_norms and summary is None and can_fold(layer):
            self.parts = folded_parts(layer, sequences)
        else:
            self.parts = layer.parts(sequences, summary) if is_unmodified(layer, quantised=True) else None
        norm = None if self.parts is None else self.parts.norm1
        self.first_norm = norm if isinstance(norm, Norm) else None

    def call(self, x: Tensor) -> Tensor:
        x, dtype = x.to(self.model_dtype), x.dtype
        if self._summary is not None:
            maps = attention_maps(self.layer, x, self._summary.kind, self.sequences)
            for value in [maps] if self.sequences is None else [image[None] for image in maps]:
                self._summary.add(value)
        packed = {} if self.sequences is None else {"sequences": self.sequences}
        return self.layer(x, **packed).to(dtype)
