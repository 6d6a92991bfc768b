"""InternViT as a transformers backbone: UperNetForSemanticSegmentation and its like take it as it is.

>>> from internvit.integrations.transformers.backbone import HFInternViTBackbone
>>> from transformers import UperNetConfig, UperNetForSemanticSegmentation
>>> hub_id = "OpenGVLab/InternViT-300M-448px-V2_5"
>>> backbone = HFInternViTBackbone.from_pretrained(hub_id, out_indices=[8, 12, 16, 24], fpn=True)
>>> model = UperNetForSemanticSegmentation(UperNetConfig(backbone_config=backbone.config, num_labels=150))
>>> model.backbone.load_state_dict(backbone.state_dict())
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoBackbone
from transformers.modeling_outputs import BackboneOutput

from internvit.dense.pyramid import FeaturePyramid
from internvit.geometry import feature_map
from internvit.integrations.transformers.model import InternVisionConfig, InternVisionModel

try:
    from transformers.backbone_utils import BackboneMixin
except ImportError:  # before transformers 5
    from transformers.utils.backbone_utils import BackboneMixin


class HFInternViTBackbone(BackboneMixin, InternVisionModel):
    """Maps [B, C, h, w] of an InternViT after chosen blocks, class token dropped; with `config.fpn` a pyramid of four.

    `out_indices` counts as transformers does: 0, "stem", is the embeddings; i, "stage{i}", the output of the i-th
    block, counted from 1, so (7, 11, 15, 23) of `internvit.InternViTBackbone` are [8, 12, 16, 24] here. Blocks past the
    last one are held, and saved, and do not run. Parameters have OpenGVLab's names, the pyramid's upstream's
    (`up1.0.weight`).

    Raises:
        ValueError: `fpn` with other than four indices, or `final_norm` without `fpn`.
    """

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        if hasattr(self, "_init_backbone"):  # before transformers 5
            self._init_backbone(config)  # type: ignore[operator]
        self.num_features = [config.hidden_size] * len(self.stage_names)
        if config.final_norm and not config.fpn:
            raise ValueError("final_norm: it is the end of the pyramid's levels, and fpn is False")
        if config.fpn:
            if len(self.out_features) != 4:
                raise ValueError(f"fpn: the pyramid takes four maps, out_features has {len(self.out_features)}")
            for name, level in FeaturePyramid(config.hidden_size, config.final_norm).named_children():
                self.add_module(name, level)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers would take initializer_range, which is 1e-10 in the 6B's configuration.
        if isinstance(module, nn.ConvTranspose2d) and not getattr(module.weight, "_is_hf_initialized", False):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            module.weight.normal_(std=math.sqrt(2 / fan_out))

    def forward(  # type: ignore[override]  # maps instead of tokens
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | str | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """Maps of a batch of images.

        Args:
            pixel_values: [B, channels, height, width], multiples of the patch size; cast to the weights' dtype.
            output_hidden_states: also the embeddings and the outputs of all blocks that ran, [B, N, C] each.
            output_attentions: also their attention maps, or "class" or "columns"; see `InternViT.forward`.
            return_dict: False for a tuple.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        stages = [self.stage_names.index(name) for name in self.out_features]
        embedded = self.embeddings(pixel_values)
        wanted = [stage - 1 for stage in stages if stage]
        _, states, attentions = self.encoder(
            embedded, bool(output_hidden_states), output_attentions or False, wanted, max(stages)
        )
        if output_hidden_states:
            chosen = [states[stage] for stage in stages]
        else:
            chosen = [*([embedded] if 0 in stages else []), *(states or ())]
        patch = self.config.patch_size
        grid = (pixel_values.shape[2] // patch, pixel_values.shape[3] // patch)
        maps: Any = tuple(feature_map(x, grid) for x in chosen)
        if self.config.fpn:
            maps = tuple(self.get_submodule(f"up{i}")(x) for i, x in enumerate(maps, 1))
        output = BackboneOutput(maps, states if output_hidden_states else None, attentions)
        use_dict = return_dict if return_dict is not None else getattr(self.config, "return_dict", True)
        return output if use_dict else output.to_tuple()


AutoBackbone.register(InternVisionConfig, HFInternViTBackbone, exist_ok=True)
