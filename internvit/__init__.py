"""InternViT as a fast, exact, drop-in PyTorch module, and the fused kernels under it.

>>> import internvit
>>> model = internvit.InternViT.from_pretrained("OpenGVLab/InternViT-300M-448px-V2_5")
>>> features = model(pixels).last_hidden_state
"""

from internvit import ops, reference
from internvit.config import HUB_IDS, VARIANTS, InternViTConfig
from internvit.convert import convert_state_dict
from internvit.modeling import InternViT
from internvit.ops import backend
from internvit.output import InternViTOutput
from internvit.patching import PatchHandle, patch

__version__ = "0.1.0"
__all__ = [
    "HUB_IDS",
    "VARIANTS",
    "InternViT",
    "InternViTConfig",
    "InternViTOutput",
    "PatchHandle",
    "backend",
    "convert_state_dict",
    "ops",
    "patch",
    "reference",
]
