"""How far a bfloat16 model and its int8 Linears are from float32, after each block and block by block."""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.inference.optimize import optimize_for_inference
from internvit.inference.packed_block import LINEARS
from internvit.model.vit import InternViT


@dataclass(frozen=True)
class StateError:
    """How far hidden states are from those in float32.

    Attributes:
        relative: ||x - truth|| / ||truth|| over all tokens and channels; massive channels outweigh all others in it.
        channel: the same for each channel, the median of them.
        cosine: the smallest of any token's.
    """

    relative: float
    channel: float
    cosine: float


@dataclass(frozen=True)
class PrecisionReport:
    """Errors of hidden states against float32; the last is last_hidden_state.

    Attributes:
        bfloat16, int8: after the embeddings and each block, L + 1.
        alone: for each block, what its int8 Linears alone add to the relative error (median channel) at the end.
        skipped: the Linears that stay bfloat16.
        features: of each image, last_hidden_state [1, N, C] in bfloat16's arithmetic and in int8's, float32.
    """

    bfloat16: list[StateError]
    int8: list[StateError]
    alone: list[float]
    skipped: list[str]
    features: list[tuple[Tensor, Tensor]] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but the features."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "features"}


def _plain(values: list[Any]) -> list[Any]:
    return [asdict(value) if isinstance(value, StateError) else value for value in values]


class _Sums:
    """Sums of squares per channel over images, and the smallest cosine."""

    def __init__(self) -> None:
        self.error: Tensor | float = 0.0
        self.truth: Tensor | float = 0.0
        self.cosine = 1.0

    def add(self, x: Tensor, truth: Tensor) -> None:
        x, truth = x.double(), truth.double()
        self.error = self.error + (x - truth).square().sum((0, 1))
        self.truth = self.truth + truth.square().sum((0, 1))
        self.cosine = min(self.cosine, F.cosine_similarity(x, truth, dim=-1).min().item())

    def result(self) -> StateError:
        error, truth = torch.as_tensor(self.error), torch.as_tensor(self.truth)
        channels = (error / truth.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        return StateError((error.sum() / truth.sum()).sqrt().item(), channels.median().item(), self.cosine)


def state_error(states: Iterable[Tensor], truths: Iterable[Tensor]) -> StateError:
    """The error of one image's hidden states [1, N, C] each, over all of the images."""
    sums = _Sums()
    for x, truth in zip(states, truths, strict=True):
        sums.add(x, truth)
    return sums.result()


@torch.no_grad()
def compare_precisions(
    model: InternViT, images: Iterable[Tensor], skip: Iterable[str] | None = None
) -> PrecisionReport:
    """Runs images in float32, bfloat16 and int8, and each block's int8 Linears alone.

    Args:
        model: in float32 on a CPU, in eval mode; it is not changed.
        images: pixels [1, 3, height, width] each.
        skip: the Linears that stay bfloat16, as in `optimize_for_inference`.

    Raises:
        ValueError: a model of another dtype, or no images; as `optimize_for_inference`.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"compare_precisions: model must be float32, got {model.dtype}")
    half = copy.deepcopy(model).bfloat16()
    fast = optimize_for_inference(half, out_dtype=torch.float32, precision="int8", skip=skip)
    depth, chosen = len(model.encoder.layers), fast.int8
    everything = [f"encoder.layers.{i}.{name}" for i in range(depth) for name in LINEARS]
    states = {frozenset[str](): [_Sums() for _ in range(depth + 1)], chosen: [_Sums() for _ in range(depth + 1)]}
    alone = [_Sums() for _ in range(depth)]
    pixels = list(images)
    if not pixels:
        raise ValueError("compare_precisions: images must have at least one, got none")
    plain: list[Tensor] = []
    quantised: list[Tensor] = []
    for int8, sums in states.items():
        fast.int8 = int8
        for x in pixels:
            hidden = fast(x, output_hidden_states=True).hidden_states
            truth = model(x, output_hidden_states=True).hidden_states
            for total, ours, exact in zip(sums, hidden, truth, strict=True):
                total.add(ours, exact)
            (quantised if int8 else plain).append(hidden[-1])
    for index, total in enumerate(alone):
        fast.int8 = frozenset(name for name in everything if name.startswith(f"encoder.layers.{index}."))
        for x, without in zip(pixels, plain, strict=True):
            total.add(fast(x).last_hidden_state, without)
    bfloat16, int8_errors = ([total.result() for total in sums] for sums in (states[frozenset()], states[chosen]))
    skipped = [name for name in everything if name not in chosen]
    added = [total.result().channel for total in alone]
    return PrecisionReport(bfloat16, int8_errors, added, skipped, list(zip(plain, quantised or plain, strict=True)))
