"""InternViT on the fused ops: the same parameters, call and result as `internvit.reference`, to rounding."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvit.config import InternViTConfig
from internvit.geometry import resize_position_embedding
from internvit.model.embeddings import Embeddings, embed
from internvit.model.encoder import InternViTEncoder
from internvit.model.feature_maps import forward_intermediates
from internvit.model.hooks import fusible_class
from internvit.model.layers import Attention, RMSNorm
from internvit.model.packed import PackedTokens, packed_output
from internvit.ops.core.validation import ROUNDINGS
from internvit.output import InternViTOutput


@fusible_class
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
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        pixel_embeds: Tensor | PackedTokens | None = None,
        output_attentions: bool | str = False,
    ) -> InternViTOutput | tuple:
        """Features of a batch of images, or of a list of images of any sizes.

        Images of a list are packed, one after the other, without padding. Their features, and each of hidden_states,
        are then `PackedTokens`, a sequence of one [N_i, C] an image, and attention maps are lists. On a CPU, without
        gradients, an image has the same bits alone, in a batch and in a list.

        Args:
            pixel_values: [B, channels, height, width], normalised by ImageNet's mean and standard deviation; any
                height and width that are multiples of the patch size. Or a list of images [channels, height, width].
                Cast to the weights' dtype.
            output_hidden_states: also return the embeddings and every block's output.
            return_dict: False returns a plain tuple of what was asked for, as torch.jit.trace always gets.
            pixel_embeds: [B, N, C], tokens embedded already, instead of pixel_values; or `PackedTokens`.
            output_attentions: also return every block's attention map (slow: all scores are held in memory), or, with
                "class", the class token's row of it, [B, heads, N], with "columns" how much each token is attended to,
                the sums over its columns, [B, heads, N] float32 without gradients; both without the other scores.

        Raises:
            TypeError: pixels that are no tensor, or not floating-point.
            ValueError: both or neither input, a wrong shape or number of channels, a size off the patch grid, another
                `output_attentions`.
        """
        embedded = embed(self.embeddings, pixel_values, pixel_embeds)
        if isinstance(embedded, PackedTokens):
            settings = {"sequences": embedded.sequences}
            results = self.encoder(embedded.values, output_hidden_states, output_attentions, **settings)
            output = packed_output(embedded, *results)
        else:
            last, hidden, attentions = self.encoder(embedded, output_hidden_states, output_attentions)
            output = InternViTOutput(last, last[:, 0], hidden, attentions)
        return output if return_dict and not torch.jit.is_tracing() else output.to_tuple()

    def forward_intermediates(self, x: Any, indices: int | Sequence[int] | None = None, **settings: Any) -> Any:
        """Outputs of chosen blocks, as timm gives them; see `internvit.model.feature_maps.forward_intermediates`."""
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

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None) -> None:
        """transformers' name for `set_gradient_checkpointing("block")`, as its Trainer calls it.

        Args:
            gradient_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`. `use_reentrant` may be either: blocks
                are checkpointed without reentrance, and the gradients are the same.

        Raises:
            ValueError: a name that `checkpoint` does not have.
        """
        self.encoder.set_gradient_checkpointing("block", gradient_checkpointing_kwargs)

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
        name_or_path: str | os.PathLike[str],
        *,
        residual_dtype: torch.dtype | None = None,
        fold_layer_scale: bool = False,
        **loading: Any,
    ) -> "InternViT":
        """Loads a checkpoint of any upstream, in eval mode.

        Args:
            residual_dtype, fold_layer_scale: as in the constructor.
            name_or_path, loading: config, dtype, device, revision, cache_dir, token, local_files_only, strict,
                image_size, patch_size, patch_resampling and prefix, of `internvit.checkpoint.load.load_pretrained`.
        """
        from internvit.checkpoint.load import load_pretrained

        model = load_pretrained(cls, name_or_path, **loading)
        model.residual_dtype = residual_dtype
        model.set_layer_scale_folding(fold_layer_scale)
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        layout: str = "opengvlab",
        max_shard_size: int | str = "5GB",
        overwrite: bool = False,
    ) -> Path:
        """Writes config.json and safetensors; see `internvit.checkpoint.save.save_pretrained`."""
        from internvit.checkpoint.save import save_pretrained

        return save_pretrained(self, folder, layout=layout, max_shard_size=max_shard_size, overwrite=overwrite)
