"""InternViT as a fast, exact, drop-in PyTorch module, and the fused kernels under it.

>>> import internvit
>>> model = internvit.InternViT.from_pretrained("OpenGVLab/InternViT-300M-448px-V2_5")
>>> features = model(pixels).last_hidden_state
"""

from internvit import ops, optim, reference
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.config import HUB_IDS, VARIANTS, InternViTConfig
from internvit.dense.backbone import InternViTBackbone
from internvit.inference.optimize import optimize_for_inference
from internvit.model.packed import PackedTokens
from internvit.model.vit import InternViT
from internvit.multimodal.connector import InternVLConnector
from internvit.multimodal.flash_connector import InternVLFlashConnector, InternVLFlashOutput
from internvit.multimodal.tiling import best_grid, tile_image
from internvit.ops import backend, set_backend
from internvit.output import InternViTOutput
from internvit.upstream.patch import PatchHandle, patch

__version__ = "0.2.0"
__all__ = [
    "HUB_IDS",
    "VARIANTS",
    "InternVLConnector",
    "InternVLFlashConnector",
    "InternVLFlashOutput",
    "InternViT",
    "InternViTBackbone",
    "InternViTConfig",
    "InternViTOutput",
    "PackedTokens",
    "PatchHandle",
    "backend",
    "best_grid",
    "convert_state_dict",
    "ops",
    "optim",
    "optimize_for_inference",
    "patch",
    "reference",
    "set_backend",
    "tile_image",
]
