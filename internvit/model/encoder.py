"""The stack of blocks.

The encoder carries the normed tensor over a layer boundary only where neither side has hooks, is checkpointed, wrapped,
compiled by itself or patched; otherwise it calls the layer. Layers wrapped by `internvit.parallel.shard_blocks` are
called, and pass on their last branch. All but compiled ones give the same bits.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internvit.config import InternViTConfig
from internvit.model import recompute
from internvit.model.attention_summary import AttentionSummary
from internvit.model.block import InternViTLayer, TrainingOptions, passes_branch, runs_between_neighbours
from internvit.model.fused_block import Norm
from internvit.model.hooks import fusible_class
from internvit.model.packed import one_by_one, runs_alone, split
from internvit.ops.core.sequences import Sequences
from internvit.output import attention_kind

CHECKPOINTING = ("none", "selective", "block")
CHECKPOINT_KWARGS = {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}


@fusible_class
class InternViTEncoder(nn.Module):
    """The stack of blocks.

    Args:
        depth: only the first blocks are built; DropPath's rates are those of the whole depth. By default all are.
    """

    def __init__(
        self, config: InternViTConfig, rounding: str = "fused", depth: int | None = None, **factory: Any
    ) -> None:
        super().__init__()
        self.options = TrainingOptions()
        self.layers = nn.ModuleList(
            InternViTLayer(config, rate, rounding, self.options, **factory) for rate in config.drop_path_rates()[:depth]
        )
        self._residual_dtype: torch.dtype | None = None
        self._checkpoint_kwargs: dict[str, Any] = {"use_reentrant": False}

    def set_gradient_checkpointing(self, mode: str, checkpoint_kwargs: Mapping[str, Any] | None = None) -> None:
        """What backward recomputes while training; see `InternViT.set_gradient_checkpointing`.

        Args:
            checkpoint_kwargs: further arguments of `torch.utils.checkpoint.checkpoint`, for mode "block".
        """
        if mode not in CHECKPOINTING:
            choices = ", ".join(map(repr, CHECKPOINTING))
            raise ValueError(f"set_gradient_checkpointing: mode must be one of {choices}, got {mode!r}")
        given = dict(checkpoint_kwargs or {})
        unknown = set(given) - CHECKPOINT_KWARGS
        if unknown:
            expected = ", ".join(sorted(CHECKPOINT_KWARGS))
            raise ValueError(f"gradient_checkpointing_kwargs: expected {expected}, got {sorted(unknown)}")
        self.options.checkpointing = mode
        self._checkpoint_kwargs = {**given, "use_reentrant": False}

    def set_layer_scale_folding(self, enabled: bool) -> None:
        """Whether LayerScale rides in the Linears' weights; see `InternViT.set_layer_scale_folding`."""
        self.options.fold_layer_scale = enabled

    @property
    def residual_dtype(self) -> torch.dtype | None:
        """The residual stream's, and so that of every hidden state; None: as it comes from the embeddings."""
        return self._residual_dtype

    @residual_dtype.setter
    def residual_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.float32):
            raise ValueError(f"residual_dtype: expected torch.float32 or None (the weights' dtype), got {dtype!r}")
        self._residual_dtype = dtype

    def cast_residual(self, embedded: Tensor) -> Tensor:
        """Embedded tokens [B, N, C] in the residual stream's dtype."""
        return embedded if self._residual_dtype is None else embedded.to(self._residual_dtype)

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' switch: whether backward recomputes anything; True recomputes whole blocks."""
        return self.options.checkpointing != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.set_gradient_checkpointing("block" if enabled else "none")

    def forward(
        self,
        hidden_states: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool | str = False,
        indices: Collection[int] = (),
        depth: int | None = None,
        sequences: Sequences | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Any, ...] | None]:
        """The last hidden state; all L + 1 hidden states and L attention maps, or what `attention_kind` names of them,
        where asked for.

        With `sequences` the hidden states are [total, C], packed images; an attention map is a list of the images'.

        With `indices` the hidden states are the outputs of these blocks alone, in order, and no other is held. Only
        the first `depth` blocks run; by default all.
        """
        kind = attention_kind(output_attentions)
        if sequences is not None and runs_alone(hidden_states, sequences):
            images = split(hidden_states, sequences)
            settings = output_hidden_states, output_attentions, indices, depth
            return _joined([self.forward(image[None], *settings) for image in images])
        hidden_states = self.cast_residual(hidden_states)
        all_hidden_states: list[Tensor] = [hidden_states] if output_hidden_states else []
        attentions: list[Any] = []
        packed: dict[str, Any] = {} if sequences is None else {"sequences": sequences}
        normed, pending = None, None
        layers: list[Any] = list(self.layers)[:depth]
        checkpoints = self.options.checkpointing == "block" and self.training and recompute.can_checkpoint()
        with recompute.scope():
            for index, layer in enumerate(layers):
                summary = None if kind is None or checkpoints else _summary(layer, kind)
                if kind is not None and summary is None:
                    attentions.append(attention_maps(layer, hidden_states, kind, sequences))
                if sequences is not None and not isinstance(layer, InternViTLayer):
                    hidden_states, normed = one_by_one(layer, hidden_states, sequences), None
                elif checkpoints:
                    hidden_states = checkpoint(layer, hidden_states, **packed, **self._checkpoint_kwargs)
                elif passes_branch(layer):
                    asked = bool(kind) or output_hidden_states or index in indices or index + 1 == len(layers)
                    defer = not asked and passes_branch(layers[index + 1])
                    result = layer(hidden_states, pending, defer, **packed)
                    (hidden_states, pending), normed = result if defer else (result, None), None
                elif not runs_between_neighbours(layer):
                    hidden_states, normed = layer(hidden_states, **packed), None
                else:
                    next_norm = _first_norm(layers[index + 1]) if index + 1 < len(layers) else None
                    hidden_states, normed = layer.forward_fused(hidden_states, normed, next_norm, sequences, summary)
                if summary is not None:
                    attentions.append(summary.of_batch() if sequences is None else summary.of_images())
                if output_hidden_states or index in indices:
                    all_hidden_states.append(hidden_states)
        return (
            hidden_states,
            tuple(all_hidden_states) if output_hidden_states or indices else None,
            tuple(attentions) if kind is not None else None,
        )


def _joined(results: list[Any]) -> tuple[Tensor, Any, Any]:
    """The results of images alone as those of packed images."""
    last, hidden, attentions = zip(*results, strict=True)

    def pack(images: Any) -> Tensor:
        return torch.cat([image[0] for image in images])

    return (
        pack(last),
        None if hidden[0] is None else tuple(map(pack, zip(*hidden, strict=True))),
        None if attentions[0] is None else tuple([m[0] for m in maps] for maps in zip(*attentions, strict=True)),
    )


def attention_maps(layer: Any, hidden_states: Tensor, kind: str, sequences: Sequences | None = None) -> Any:
    """A block's attention map, or the `kind` of rows of it, from its input; of packed images a list of the images'."""
    if sequences is None:
        return layer.attention_map(hidden_states, kind)
    return [layer.attention_map(image[None], kind)[0] for image in split(hidden_states, sequences)]


def _summary(layer: Any, kind: str) -> AttentionSummary | None:
    """What a layer that runs between its neighbours fills; None where maps come from its input."""
    if kind == "maps" or not runs_between_neighbours(layer) or passes_branch(layer) or not layer.summarizes_attention():
        return None
    return AttentionSummary(kind)


def _first_norm(layer: Any) -> Norm | None:
    return layer.first_norm() if runs_between_neighbours(layer) else None
