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
from internvit.model import recompute
from internvit.model.layers import (
    MLP,
    Attention,
    Embeddings,
    RMSNorm,
    has_hooks,
    is_plain_norm,
    make_norm,
    normalize,
    project_scaled,
    remember_norm,
)
from internvit.ops import layer_scale_residual, layer_scale_residual_norm
from internvit.ops.core.validation import ROUNDINGS
from internvit.output import InternViTOutput
from internvit.reference import drop_path_scale, resize_position_embedding

CHECKPOINTING = ("none", "selective", "block")


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
        self.selective_checkpointing = False
        self.fold_layer_scale = False

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
        if self.selective_checkpointing and self.training and torch.is_grad_enabled():
            return self._step_selectively(hidden_states, normed, next_norm)
        # No name is given to a branch: it would live through the next one.
        hidden_states, normed = self._add(hidden_states, *self._attention_branch(normed), self.norm2)
        return self._add(hidden_states, *self._mlp_branch(normed), next_norm)

    def _step_selectively(
        self, hidden_states: Tensor, normed: Tensor, next_norm: nn.Module | None
    ) -> tuple[Tensor, Tensor | None]:
        """`step` that keeps the stream, qkv and attention's output, and recomputes what follows them."""
        splits = _is_plain_branch(self.attn, Attention)
        attended = self.attn.attend(normed) if splits else self.attn(normed)

        def rest(hidden_states: Tensor, attended: Tensor) -> tuple[Tensor, Tensor | None]:
            branch: tuple[Tensor, Tensor | None] = attended, self.ls1
            if splits:
                branch = project_scaled(self.attn.proj, attended, self.ls1, self.fold_layer_scale)
            hidden_states, normed = self._add(hidden_states, *branch, self.norm2)
            return self._add(hidden_states, *self._mlp_branch(normed), next_norm)

        # DropPath draws inside, so that its random numbers are replayed.
        hidden_states, next_normed = checkpoint(rest, hidden_states, attended, use_reentrant=False)
        if next_norm is not None and next_normed is not None and is_plain_norm(next_norm):
            remember_norm(next_norm, hidden_states, next_normed)
        return hidden_states, next_normed

    def _attention_branch(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """Attention's branch, and the LayerScale still to be applied to it."""
        if not _is_plain_branch(self.attn, Attention):
            return self.attn(normed), self.ls1
        return project_scaled(self.attn.proj, self.attn.attend(normed), self.ls1, self.fold_layer_scale)

    def _mlp_branch(self, normed: Tensor) -> tuple[Tensor, Tensor | None]:
        """The MLP's branch, and the LayerScale still to be applied to it."""
        if not _is_plain_branch(self.mlp, MLP):
            return self.mlp(normed), self.ls2
        return project_scaled(self.mlp.fc2, self.mlp.expand(normed), self.ls2, self.fold_layer_scale)

    def _add(
        self, residual: Tensor, branch: Tensor, gamma: Tensor | None, norm: nn.Module | None
    ) -> tuple[Tensor, Any]:
        """residual + drop_path(branch * gamma), and `norm` of that; without gamma it is in the branch already."""
        row_scale = None
        if self.training and self.drop_path_rate > 0:
            row_scale = drop_path_scale(residual.shape[0], self.drop_path_rate, residual.device)
        if norm is None or not is_plain_norm(norm):
            out = layer_scale_residual(residual, branch, gamma, row_scale)
            return out, None if norm is None else norm(out)
        out, normed = layer_scale_residual_norm(
            *(residual, branch, norm.weight, norm.bias, gamma, row_scale),
            eps=norm.eps,
            norm_type=norm.kind,
            rounding=norm.rounding,
        )
        return out, remember_norm(norm, out, normed)

    def extra_repr(self) -> str:
        return f"drop_path_rate={self.drop_path_rate:.3g}" if self.drop_path_rate else ""


def _is_plain_branch(module: nn.Module, kind: type) -> bool:
    """Whether the block may run the parts of its attention or MLP instead of calling it."""
    return type(module) is kind and not has_hooks(module)


def is_plain_layer(layer: nn.Module) -> bool:
    """Whether the encoder may run `layer` between its neighbours instead of calling it."""
    return type(layer) is InternViTLayer and not has_hooks(layer)


class InternViTEncoder(nn.Module):
    """The stack of blocks."""

    def __init__(self, config: InternViTConfig, rounding: str = "fused", **factory: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InternViTLayer(config, r, rounding, **factory) for r in config.drop_path_rates())
        self.fold_layer_scale = False
        self._checkpointing = "none"
        self._residual_dtype: torch.dtype | None = None

    def set_gradient_checkpointing(self, mode: str) -> None:
        """What backward recomputes while training; see `InternViT.set_gradient_checkpointing`."""
        if mode not in CHECKPOINTING:
            choices = ", ".join(map(repr, CHECKPOINTING))
            raise ValueError(f"set_gradient_checkpointing: mode must be one of {choices}, got {mode!r}")
        self._checkpointing = mode
        for module in self.modules():
            if isinstance(module, InternViTLayer):
                module.selective_checkpointing = mode == "selective"

    def set_layer_scale_folding(self, enabled: bool) -> None:
        """Whether LayerScale rides in the Linears' weights; see `InternViT.set_layer_scale_folding`."""
        self.fold_layer_scale = enabled
        for module in self.modules():
            if isinstance(module, InternViTLayer):
                module.fold_layer_scale = enabled

    @property
    def residual_dtype(self) -> torch.dtype | None:
        """The residual stream's, and so that of every hidden state; None: as it comes from the embeddings."""
        return self._residual_dtype

    @residual_dtype.setter
    def residual_dtype(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.float32):
            raise ValueError(f"residual_dtype: expected torch.float32 or None (the weights' dtype), got {dtype!r}")
        self._residual_dtype = dtype

    def enter(self, embedded: Tensor) -> Tensor:
        """The residual stream's begin [B, N, C], in its dtype."""
        return embedded if self._residual_dtype is None else embedded.to(self._residual_dtype)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether backward recomputes anything; set to True, as transformers does, it recomputes whole blocks."""
        return self._checkpointing != "none"

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.set_gradient_checkpointing("block" if enabled else "none")

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
        hidden_states = self.enter(hidden_states)
        all_hidden_states, attentions = [hidden_states] if output_hidden_states else [], []
        normed = None
        layers: list[Any] = list(self.layers)[:depth]
        with recompute.scope():
            for index, (layer, next_layer) in enumerate(zip(layers, [*layers[1:], None], strict=True)):
                if output_attentions:
                    attentions.append(layer.attn.attention_map(layer.norm1(hidden_states)))
                if self._checkpointing == "block" and self.training and torch.is_grad_enabled():
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
        residual_dtype: torch.float32 keeps the residual stream in float32 beside 16-bit weights, as float16 needs where
            activations pass 65504; last_hidden_state and hidden_states are then float32. Change it by assignment.
        fold_layer_scale: as `set_layer_scale_folding`.

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
        residual_dtype: torch.dtype | None = None,
        fold_layer_scale: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, InternViTConfig):
            raise ValueError(f"InternViT: config must be an InternViTConfig, got {type(config).__name__}")
        self.config = config
        self.embeddings = Embeddings(config, device=device, dtype=dtype)
        self.encoder = InternViTEncoder(config, rounding, device=device, dtype=dtype)
        self.set_rounding(rounding)
        self.residual_dtype = residual_dtype
        self.set_layer_scale_folding(fold_layer_scale)

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
        """Outputs of chosen blocks, as timm gives them; see `internvit.model.feature_maps.forward_intermediates`."""
        from internvit.model.feature_maps import forward_intermediates

        return forward_intermediates(self, x, indices, **settings)

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings.patch_embedding.weight.device

    @property
    def residual_dtype(self) -> torch.dtype | None:
        """The residual stream's, and so that of every hidden state; None: the weights'."""
        return self.encoder.residual_dtype

    @residual_dtype.setter
    def residual_dtype(self, dtype: torch.dtype | None) -> None:
        self.encoder.residual_dtype = dtype

    def get_input_embeddings(self) -> Embeddings:
        return self.embeddings

    def set_gradient_checkpointing(self, mode: str) -> None:
        """Chooses what backward recomputes while training; never active in eval mode. All give the same bits.

        Args:
            mode: "none" keeps 12 units of [N, C] a block and recomputes norms and GELU alone; "selective" keeps the
                stream, qkv and attention's output, 5 units, and recomputes proj and the MLP; "block" keeps the stream,
                1 unit, and recomputes everything. docs/training.md has the FLOPs and times of each.

        Raises:
            ValueError: another mode.
        """
        self.encoder.set_gradient_checkpointing(mode)

    def gradient_checkpointing_enable(self) -> None:
        """`set_gradient_checkpointing("block")`, by transformers' name."""
        self.set_gradient_checkpointing("block")

    def gradient_checkpointing_disable(self) -> None:
        self.set_gradient_checkpointing("none")

    def set_layer_scale_folding(self, enabled: bool) -> None:
        """Folds LayerScale into proj and fc2 wherever gradients are on: 10 units of [N, C] a block instead of 12.

        The weight's gradient gives LayerScale's, so no branch is kept for it; names and values of parameters stay. The
        folded weight is rounded instead of the scaled branch: results are as exact, and not the same bits. A layer
        whose Linear has hooks or an adapter, or is another module, scales its branch as before.

        In float16 the forward raises a ValueError where gamma * weight leaves the normal range, as it nearly always
        does; use bfloat16.
        """
        self.encoder.set_layer_scale_folding(enabled)

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
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        residual_dtype: torch.dtype | None = None,
        fold_layer_scale: bool = False,
        **kwargs: Any,
    ) -> "InternViT":
        """Loads a checkpoint of any upstream; see `internvit.checkpoint.load.load_pretrained` for further arguments."""
        from internvit.checkpoint.load import load_pretrained

        model = load_pretrained(cls, name_or_path, **kwargs)
        model.residual_dtype = residual_dtype
        model.set_layer_scale_folding(fold_layer_scale)
        return model

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> Path:
        """Writes config.json and safetensors; see `internvit.checkpoint.save.save_pretrained` for the arguments."""
        from internvit.checkpoint.save import save_pretrained

        return save_pretrained(self, folder, **kwargs)
