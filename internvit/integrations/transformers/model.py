"""InternViT for transformers: importing this package registers it with the Auto classes.

>>> import internvit.integrations.transformers
>>> from transformers import AutoModel
>>> model = AutoModel.from_pretrained("OpenGVLab/InternViT-300M-448px-V2_5")  # no trust_remote_code

`AutoBackbone` gives `HFInternViTBackbone`, for UperNetForSemanticSegmentation and its like (transformers 5.24's
`AutoBackbone.from_pretrained` takes hub ids alone: load a folder by the class itself).

The model type is the one in OpenGVLab's repositories, so in transformers 5 an InternVLConfig whose vision_config is an
`InternVisionConfig` builds transformers' InternVL with this tower inside. (Saved, it is loaded again with `config=`:
InternVLConfig reads any vision_config in a file as transformers' own tower. `internvit.patch` changes no file.)

`attn_implementation="internvit"` gives any transformers model this library's attention where it has neither mask nor
dropout, and SDPA elsewhere. It gets q and k already normalised: for QK-norm inside attention use this model, or
`internvit.patch`.
"""

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from internvit.config import InternViTConfig
from internvit.model.block import InternViTLayer
from internvit.model.embeddings import Embeddings, embed
from internvit.model.vit import InternViT
from internvit.names import listed
from internvit.ops import attention

try:
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # before transformers 5
    from transformers.utils.backbone_utils import BackboneConfigMixin

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(InternViTConfig) if field.name != "name"}


class InternVisionConfig(BackboneConfigMixin, PretrainedConfig):
    """OpenGVLab's configuration: the fields of `internvit.InternViTConfig`; others are kept and not used.

    For `HFInternViTBackbone` also `out_features` or `out_indices` (0, "stem", is the embeddings;
    i, "stage{i}", the output of the i-th block, counted from 1), `fpn` and `final_norm`.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(self, **kwargs: Any) -> None:
        fields = {name: kwargs.pop(name, default) for name, default in _DEFAULTS.items()}
        for name, value in fields.items():
            setattr(self, name, value)
        self.fpn, self.final_norm = kwargs.pop("fpn", False), kwargs.pop("final_norm", False)
        kwargs.pop("stage_names", None)  # they follow from the depth
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(self.num_hidden_layers))]
        chosen = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__init__(**kwargs)
        features, indices = (None if given is None else list(given) for given in chosen)
        if hasattr(self, "set_output_features_output_indices"):
            self.set_output_features_output_indices(features, indices)
        else:
            align = sys.modules[BackboneConfigMixin.__module__].get_aligned_output_features_output_indices
            self._out_features, self._out_indices = align(features, indices, self.stage_names)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "InternVisionConfig":
        """As transformers' own; the config.json of another layout is an error.

        Raises:
            ValueError: its keys mean other things, and its weights have other names.
        """
        model_type = config_dict.get("model_type") or cls.model_type
        if "internvit" in config_dict or not str(model_type).startswith("intern_vit"):
            layout = config_dict.get("layout") or config_dict.get("architecture") or model_type
            raise ValueError(
                f"InternVisionConfig: expected model_type {cls.model_type}, got the configuration of {layout}; "
                f"internvit.InternViT reads it, `internvit convert SOURCE TARGET --to opengvlab` converts it"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_internvit(self) -> InternViTConfig:
        """The same architecture as this library's configuration.

        Raises:
            ValueError: a feature that InternViT does not have here, such as dropout.
        """
        return InternViTConfig.from_dict(self.to_dict())


class InternVisionModel(PreTrainedModel):
    """`internvit.InternViT` as a transformers model, under OpenGVLab's parameter names."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision_model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["InternViTLayer"]  # noqa: RUF012 (transformers reads a list)

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        vit = InternViT(config.to_internvit())
        self.embeddings = vit.embeddings
        self.encoder = vit.encoder
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        with torch.no_grad():
            if isinstance(module, InternViTLayer):
                _fill(module.ls1, self.config.initializer_factor)
                _fill(module.ls2, self.config.initializer_factor)
            elif isinstance(module, Embeddings):
                for parameter in (module.class_embedding, module.position_embedding):
                    if not getattr(parameter, "_is_hf_initialized", False):
                        parameter.normal_(std=self.config.initializer_range or 0.02)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers' own, which would start with random weights where a checkpoint lacks some of the tower's.

        Raises:
            ValueError: the checkpoint has not all parameters of the tower under OpenGVLab's names.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        missing = sorted(name for name in info["missing_keys"] if name.startswith(("embeddings.", "encoder.")))
        if missing:
            raise ValueError(
                f"{args[0] if args else cls.__name__}: expected the tower under OpenGVLab's names, {listed(missing)} "
                f"missing; internvit.InternViT reads every layout, `internvit convert SOURCE TARGET --to opengvlab` "
                f"converts it"
            )
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        pixel_embeds: Tensor | None = None,
        output_attentions: bool | str | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Features of pixel_values [B, channels, height, width], or of embedded tokens [B, N, C].

        output_hidden_states may be the index, or a list of indices, of the states wanted; the others are then None.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        states = len(self.encoder.layers) + 1
        wanted = _indices(output_hidden_states, states)
        embedded = embed(self.embeddings, pixel_values, pixel_embeds)
        last, hidden, maps = self.encoder(embedded, not wanted <= {states - 1}, output_attentions or False)
        if wanted:
            all_states = hidden or (None,) * (states - 1) + (last,)
            hidden = tuple(state if i in wanted else None for i, state in enumerate(all_states))
        output = BaseModelOutputWithPooling(last, last[:, 0], hidden if wanted else None, maps)
        use_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return output if use_dict else output.to_tuple()


def _fill(parameter: Tensor, value: float) -> None:
    if not getattr(parameter, "_is_hf_initialized", False):  # what transformers has loaded
        parameter.fill_(value)


def _indices(wanted: bool | int | list[int] | None, states: int) -> set[int]:
    """Which of the hidden states are asked for."""
    if wanted is None or isinstance(wanted, bool):
        return set(range(states)) if wanted else set()
    chosen = [wanted] if isinstance(wanted, int) else wanted
    return {i % states for i in chosen if -states <= i < states}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "internvit".

    Args:
        query, key, value: [B, H, N, D], normalised already where the model has QK-norm.

    Returns:
        [B, N, H, D], and no attention map.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    more = [name for name in ("position_bias", "cache", "softcap", "s_aux") if kwargs.get(name) is not None]
    plain = attention_mask is None and not dropout and not causal and not more
    if not plain or query.shape != key.shape or query.shape != value.shape:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return attention(q, k, v, scale=scaling), None


def register() -> None:
    """Registers configuration, model and attention; importing this package has done it."""
    AutoConfig.register(InternVisionConfig.model_type, InternVisionConfig, exist_ok=True)
    AutoModel.register(InternVisionConfig, InternVisionModel, exist_ok=True)
    AttentionInterface.register("internvit", attention_forward)
    AttentionMaskInterface.register("internvit", sdpa_mask)


register()
