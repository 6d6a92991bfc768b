"""Autocast for ops that multiply matrices: float32 operands are cast as torch casts them for its own products."""

import torch
from torch import Tensor


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on `device`; None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t.to(dtype) if t is not None and t.dtype in (torch.float32, torch.bfloat16, torch.float16) else t
