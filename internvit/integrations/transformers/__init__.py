"""InternViT for transformers: importing this package registers it with the Auto classes."""

from internvit.integrations.transformers.backbone import HFInternViTBackbone
from internvit.integrations.transformers.model import InternVisionConfig, InternVisionModel

__all__ = ["HFInternViTBackbone", "InternVisionConfig", "InternVisionModel"]
