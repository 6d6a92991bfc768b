"""Tokens of images of several sizes, one image after the other, without padding."""

from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from internvit.geometry import check_pixels
from internvit.ops.core.sequences import Sequences, readable
from internvit.output import InternViTOutput


class PackedTokens(SequenceOf[Tensor]):
    """Features of images of several sizes: a sequence of one tensor [N_i, C] an image, views of one packed tensor.

    `packed[i]` are the tokens of image i, its class token first; `len`, iteration and slices are a tuple's.

    Args:
        values: [total, C], the images one after the other.
        grids: rows and columns of each image's patches; N_i = 1 + rows * columns.
        sequences: cu_seqlens and max_seqlen; made from `grids` by default.

    Raises:
        ValueError: grids whose tokens are not those of `values`.
    """

    def __init__(self, values: Tensor, grids: SequenceOf[tuple[int, int]], sequences: Sequences | None = None) -> None:
        self.values, self.grids = values, tuple(grids)
        self.lengths = tuple(1 + rows * columns for rows, columns in self.grids)
        if values.dim() != 2 or values.shape[0] != sum(self.lengths):
            raise ValueError(
                f"PackedTokens: values must have shape [{sum(self.lengths)}, C] (the grids' tokens), got "
                f"{list(values.shape)}"
            )
        if sequences is None:
            ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
            # From pinned memory the copy waits for nothing.
            ends = ends.pin_memory() if values.is_cuda else ends
            sequences = Sequences(ends.to(values.device, non_blocking=True), max(self.lengths, default=0))
        self.sequences = sequences

    @property
    def cu_seqlens(self) -> Tensor:
        """[B + 1] int32: image i is values[cu_seqlens[i] : cu_seqlens[i + 1]]."""
        return self.sequences.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        """The tokens of the largest image."""
        return self.sequences.max_seqlen

    def with_values(self, values: Tensor) -> "PackedTokens":
        """Other features of the same images."""
        return PackedTokens(values, self.grids, self.sequences)

    def to(self, *args: Any, **kwargs: Any) -> "PackedTokens":
        """As `Tensor.to`, of the features; cu_seqlens follows to another device."""
        values = self.values.to(*args, **kwargs)
        ends = self.cu_seqlens.to(values.device)
        return PackedTokens(values, self.grids, self.sequences._replace(cu_seqlens=ends))

    def class_tokens(self) -> Tensor:
        """[B, C]: the class token of each image."""
        return self.values[self.cu_seqlens[:-1].long()]

    def maps(self) -> list[Tensor]:
        """Each image's patch tokens as a contiguous map [C, rows, columns]."""
        pairs = zip(self, self.grids, strict=True)
        return [tokens[1:].t().unflatten(1, grid).contiguous() for tokens, grid in pairs]

    def padded(self, value: float = 0.0) -> tuple[Tensor, Tensor]:
        """[B, N, C] with `value` after each image's tokens, N the largest one's; and what is a token, bool [B, N]."""
        tokens = torch.nn.utils.rnn.pad_sequence(list(self), batch_first=True, padding_value=value)
        lengths = self.cu_seqlens.diff()[:, None]
        return tokens, torch.arange(tokens.shape[1], device=lengths.device) < lengths

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: Any) -> Any:
        return self.values.split(self.lengths)[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.split(self.lengths))

    def __repr__(self) -> str:
        return f"PackedTokens(images={len(self)}, tokens={self.values.shape[0]}, width={self.values.shape[1]})"


def _leaves(packed: PackedTokens) -> tuple[list[Any], Any]:
    return [packed.values, packed.cu_seqlens], (packed.grids, packed.lengths, packed.max_seqlen)


def _from_leaves(leaves: Any, context: Any) -> PackedTokens:
    """Unchecked: a tree's leaves may be anything."""
    packed = PackedTokens.__new__(PackedTokens)
    packed.values, ends = leaves
    packed.grids, packed.lengths, max_seqlen = context
    packed.sequences = Sequences(ends, max_seqlen)
    return packed


# DistributedDataParallel and FSDP2 look for tensors in what forward returns: with static_graph=True DDP does not reduce
# gradients that come through others.
register_pytree_node(PackedTokens, _leaves, _from_leaves)


def per_token(factors: Tensor, sequences: Sequences, total: int) -> Tensor:
    """A number for each token [total] from one for each image [B]; reads nothing back from a device."""
    return factors.repeat_interleave(sequences.cu_seqlens.diff(), output_size=total)


def split(x: Tensor, sequences: Sequences) -> list[Tensor]:
    """The images of x [total, ...]. On a GPU this waits for the device."""
    return [x[tokens] for tokens in sequences.slices()]


def one_by_one(module: Callable[[Tensor], Tensor], x: Tensor, sequences: Sequences) -> Tensor:
    """A module that knows batches alone, on each image of x [total, C] as a batch of one."""
    return torch.cat([module(image[None])[0] for image in split(x, sequences)])


def runs_alone(x: Tensor, sequences: Sequences) -> bool:
    """Whether packed images go through the blocks one by one, as batches of one: on a CPU, without gradients.

    GEMMs choose their order of summation by the number of rows (`internvit.ops.linear`): for an image's own bits the
    Linears take one image at a time. Then the rest does too, and finds it in cache.
    """
    no_gradients = x.is_cpu and not torch.is_grad_enabled()
    return no_gradients and sequences.cu_seqlens.shape[0] > 1 and readable(sequences.cu_seqlens)


def pack_images(embeddings: Any, images: SequenceOf[Tensor]) -> PackedTokens:
    """Tokens of images [channels, height, width]: one batch of the embeddings, and one position embedding, a size.

    Raises:
        TypeError: an image that is no floating-point tensor.
        ValueError: no image, a wrong shape or number of channels, or a size off the patch grid.
    """
    if not len(images):
        raise ValueError("pixel_values: expected at least one image, got an empty list")
    grids: list[tuple[int, int]] = []
    by_size: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        if isinstance(image, Tensor) and image.dim() != 3:
            channels = embeddings.config.num_channels
            raise ValueError(
                f"pixel_values[{i}]: expected [{channels}, height, width], got {list(image.shape)}; a batch of images "
                "of one size is a tensor, not a list"
            )
        grids.append(check_pixels(embeddings.config, image[None] if isinstance(image, Tensor) else image))
        by_size.setdefault(image.shape, []).append(i)
    tokens: list[Any] = [None] * len(images)
    for places in by_size.values():
        batch = embeddings(torch.stack([images[i] for i in places]))
        for place, image in zip(places, batch, strict=True):
            tokens[place] = image
    return PackedTokens(torch.cat(tokens), grids)


def packed_output(
    embedded: PackedTokens, last: Tensor, hidden: SequenceOf[Tensor] | None, attentions: Any = None
) -> InternViTOutput:
    """The output of packed images from the encoder's results [total, C]."""
    features = embedded.with_values(last)
    states = None if hidden is None else tuple(map(embedded.with_values, hidden))
    return InternViTOutput(features, features.class_tokens(), states, attentions)
