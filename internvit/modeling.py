"""InternViT on the fused ops: the same parameters, call and result as `internvit.reference`, to rounding.

Between two branches there is one pass over memory: `layer_scale_residual_norm` adds the branch and normalises the sum
for the next one. A layer called alone is complete; the encoder carries the normed tensor over a layer boundary only
where neither side has hooks, is checkpointed, wrapped or patched. Both give the same bits.
"""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internvit.config import InternViTConfig
from internvit.modules import (
    MLP,
    Attention,
    Embeddings,
    RMSNorm,
    has_hooks,
    is_plain_norm,
    make_norm,
    normalize,
    remember_norm,
)
from internvit.ops import layer_scale_residual, layer_scale_residual_norm, recompute
from internvit.ops.validation import ROUNDINGS
from internvit.output import InternViTOutput
from internvit.reference import drop_path_scale, resize_position_embedding


class InternViTLayer(nn.Module):
    """One pre-norm block with LayerScale and DropPath.

    x = x + drop_path(attn(norm1(x)) * ls1);  x = x + drop_path(mlp(norm2(x)) * ls2)
    """

    def __init__(
        self, config: InternViTConfig, drop_path_rate: float = 0.0, rounding: str = "fused", **factory: Any
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(config, rounding, **factory)
        self.attn = Attention(config, rounding, **factory)
        self.norm2 = make_norm(config, rounding, **factory)
        self.mlp = MLP(config, **factory)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor, **factory))
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), config.initializer_factor, **factory))
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The block's output [B, N, C]."""
        with recompute.scope():
            return self.step(hidden_states, None, None)[0]

    def step(
        self, hidden_states: Tensor, normed: Tensor | None, next_norm: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """The block between two neighbours.

        Args:
            hidden_states: [B, N, C], the residual stream.
            normed: norm1(hidden_states) if the block before has made it.
            next_norm: the norm that the next block begins with, to be applied in the last pass.

        Returns:
            The residual stream after this block, and next_norm of it (None without next_norm).
        """
        if normed is None:
            normed = normalize(self.norm1, hidden_states)
        hidden_states, normed = self._add(hidden_states, self.attn(normed), self.ls1, self.norm2)
        return self._add(hidden_states, self.mlp(normed), self.ls2, next_norm)

    def _add(self, residual: Tensor, branch: Tensor, gamma: Tensor, norm: nn.Module | None) -> tuple[Tensor, Any]:
        """residual + drop_path(branch * gamma), and `norm` of that."""
        row_scale = None
        if self.training and self.drop_path_rate > 0:
            row_scale = drop_path_scale(residual.shape[0], self.drop_path_rate, residual.device)
        if norm is None or not is_plain_norm(norm):
            out = layer_scale_residual(residual, branch, gamma, row_scale)
            return out, None if norm is None else norm(out)
        out, normed = layer_scale_residual_norm(
            residual, branch, gamma, row_scale, norm.weight, norm.bias, norm.eps, norm.kind, norm.rounding
        )
        return out, remember_norm(norm, out, normed)

    def extra_repr(self) -> str:
        return f"drop_path_rate={self.drop_path_rate:.3g}" if self.drop_path_rate else ""


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether the encoder may run `layer` between its neighbours instead of calling it."""
    return type(layer) is InternViTLayer and not has_hooks(layer)


class InternViTEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: InternViTConfig, rounding: str = "fused", **factory: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InternViTLayer(config, r, rounding, **factory) for r in config.drop_path_rates())
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        indices: Collection[int] = (),
        depth: int | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
        """The last hidden state; all L + 1 hidden states and L attention maps where asked for.

        With `indices` the hidden states are the outputs of these blocks alone, in order, and no other is held. Only
        the first `depth` blocks run; by default all.
        """
        all_hidden_states, attentions = [hidden_states] if output_hidden_states else [], []
        normed = None
        layers: list[Any] = list(self.layers)[:depth]
        with recompute.scope():
            for index, (layer, next_layer) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
                if output_attentions:
                    attentions.append(layer.attn.attention_map(layer.norm1(hidden_states)))
                if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                    hidden_states = checkpoint(layer, hidden_states, use_reentrant=False)
                elif not is_plain_layer(layer):
                    hidden_states, normed = layer(hidden_states), None
                else:
                    next_norm = next_layer.norm1 if next_layer is not None and is_plain_layer(next_layer) else None
                    if next_norm is not None and not is_plain_norm(next_norm):
                        next_norm = None
                    hidden_states, normed = layer.step(hidden_states, normed, next_norm)
                if output_hidden_states or index in indices:
                    all_hidden_states.append(hidden_states)
        return (
            hidden_states,
            tuple(all_hidden_states) if output_hidden_states or indices else None,
            tuple(attentions) if output_attentions else None,
        )


class InternViT(nn.Module):
    """InternViT: pixels in, token features out; a drop-in for OpenGVLab's InternVisionModel.

    Args:
        config: the architecture; `InternViTConfig.from_name("internvit-300m-448px")`, for example.
        rounding: "fused" (default: each fused op rounds once) or "reference" (upstream's sequence of roundings).
        device, dtype: of the parameters; `device="meta"` allocates nothing.

    Example:
        >>> model = internvit.InternViT.from_pretrained("OpenGVLab/InternViT-300M-448px-V2_5", dtype=torch.bfloat16)
        >>> features = model(pixels).last_hidden_state  # [B, 1025, 1024] for 448 x 448 pixels
    """

    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ("InternViTLayer",)

    def __init__(
        self,
        config: InternViTConfig,
        rounding: str = "fused",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, InternViTConfig):
            raise ValueError(f"InternViT: config must be an InternViTConfig, got {type(config).__name__}")
        self.config = config
        self.embeddings = Embeddings(config, device=device, dtype=dtype)
        self.encoder = InternViTEncoder(config, rounding, device=device, dtype=dtype)
        self.set_rounding(rounding)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        pixel_embeds: Tensor | None = None,
        output_attentions: bool = False,
    ) -> InternViTOutput | tuple:
        """Features of a batch of images.

        Args:
            pixel_values: [B, channels, height, width], normalised by ImageNet's mean and standard deviation; any
                height and width that are multiples of the patch size. Cast to the weights' dtype.
            output_hidden_states: also return the embeddings and every block's output.
            return_dict: False returns a plain tuple of what was asked for.
            pixel_embeds: [B, N, C], tokens embedded already, instead of pixel_values.
            output_attentions: also return every block's attention map (slow: all scores are held in memory).

        Raises:
            ValueError: both or neither input, a wrong shape or number of channels, or a size off the patch grid.
        """
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError(f"give pixel_values or pixel_embeds, got {'neither' if pixel_embeds is None else 'both'}")
        if pixel_values is not None:
            hidden_states = self.embeddings(pixel_values)
        else:
            assert pixel_embeds is not None
            if pixel_embeds.dim() != 3 or pixel_embeds.shape[-1] != self.config.hidden_size:
                shape = list(pixel_embeds.shape)
                raise ValueError(f"pixel_embeds: expected [batch, tokens, {self.config.hidden_size}], got {shape}")
            hidden_states = pixel_embeds
        last, hidden, attentions = self.encoder(hidden_states, output_hidden_states, output_attentions)
        output = InternViTOutput(last, last[:, 0], hidden, attentions)
        return output if return_dict else output.to_tuple()

    def forward_intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None, **settings: Any) -> Any:
        """Outputs of chosen blocks, as timm gives them; see `internvit.intermediates.forward_intermediates`."""
        from internvit.intermediates import forward_intermediates

        return forward_intermediates(self, x, indices, **settings)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.patch_embedding.weight.device

    def get_input_embeddings(self) -> Embeddings:
        return self.embeddings

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes each block in backward while training; off by default, never active in eval mode."""
        self.encoder.gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        self.encoder.gradient_checkpointing = False

    def set_rounding(self, rounding: str) -> None:
        """Switches every norm and attention to "fused" or "reference" rounding."""
        if rounding not in ROUNDINGS:
            raise ValueError(f"InternViT: rounding must be one of {', '.join(map(repr, ROUNDINGS))}, got {rounding!r}")
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention):
                module.rounding = rounding

    def resize_pos_embeddings(self, old_size: int, new_size: int, patch_size: int | None = None) -> None:
        """Replaces the position embedding parameter by one for another native image size, as upstream does.

        Args:
            old_size: the current native size in pixels.
            new_size: the new one, a multiple of the patch size.
            patch_size: of this model; only checked.

        Raises:
            ValueError: old_size or patch_size is not this model's, or new_size is no multiple of the patch.
        """
        config = self.config
        for name, given, own in (
            ("old_size", old_size, config.image_size),
            ("patch_size", patch_size or config.patch_size, config.patch_size),
        ):
            if given != own:
                raise ValueError(f"resize_pos_embeddings: {name} must be this model's {own}, got {given}")
        resized = config.replace(image_size=new_size, name=config.name)
        old = self.embeddings.position_embedding
        mode = "float32" if config.pos_embed_mode == "static" else config.pos_embed_mode
        position = resize_position_embedding(old.detach(), config.grid_size, resized.grid_size, mode)
        self.embeddings.position_embedding = nn.Parameter(position.clone(), requires_grad=old.requires_grad)
        self.config = self.embeddings.config = resized

    @classmethod
    def from_pretrained(cls, name_or_path: str | os.PathLike, **kwargs: Any) -> "InternViT":
        """Loads a checkpoint of any upstream; see `internvit.checkpoint.load_pretrained` for the arguments."""
        from internvit.checkpoint import load_pretrained

        return load_pretrained(cls, name_or_path, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> Path:
        """Writes config.json and safetensors; see `internvit.checkpoint.save_pretrained` for the arguments."""
        from internvit.checkpoint import save_pretrained

        return save_pretrained(self, folder, **kwargs)
