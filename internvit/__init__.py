"""InternViT as a fast, exact, drop-in PyTorch module, and the fused kernels under it.

>>> import internvit
>>> model = internvit.InternViT.from_pretrained("OpenGVLab/InternViT-300M-448px-V2_5")
>>> features = model(pixels).last_hidden_state
"""

from internvit import ops, optim, reference
from internvit.backbone import InternViTBackbone
from internvit.config import HUB_IDS, VARIANTS, InternViTConfig
from internvit.connector import InternVLConnector
from internvit.convert import convert_state_dict
from internvit.inference import optimize_for_inference
from internvit.modeling import InternViT
from internvit.ops import backend
from internvit.output import InternViTOutput
from internvit.patching import PatchHandle, patch
from internvit.tiling import best_grid, tile_image

__version__ = "0.1.0"
__all__ = [
    "HUB_IDS",
    "VARIANTS",
    "InternVLConnector",
    "InternViT",
    "InternViTBackbone",
    "InternViTConfig",
    "InternViTOutput",
    "PatchHandle",
    "backend",
    "best_grid",
    "convert_state_dict",
    "ops",
    "optim",
    "optimize_for_inference",
    "patch",
    "reference",
    "tile_image",
]
