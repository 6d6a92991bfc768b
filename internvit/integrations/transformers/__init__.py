"""InternViT for transformers: importing this package registers it with the Auto classes."""

from internvit.integrations.transformers.backbone import HFInternViTBackbone
from internvit.integrations.transformers.model import InternVisionConfig, InternVisionModel
from internvit.integrations.transformers.patch_on_load import patch_on_load

__all__ = ["HFInternViTBackbone", "InternVisionConfig", "InternVisionModel", "patch_on_load"]
