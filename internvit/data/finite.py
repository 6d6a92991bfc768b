"""Why an image's features that are not finite are no features."""

import torch


def not_finite(dtype: torch.dtype) -> str:
    """The reason, for the message that names the image; `dtype` is that of the model."""
    name = str(dtype).removeprefix("torch.")
    wider = "; take bfloat16 or float32, whose range is wider" if dtype == torch.float16 else ""
    return f"features that are infinite or NaN, computed in {name}{wider}"
