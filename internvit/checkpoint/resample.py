"""A checkpoint's embeddings at another native image size or patch size, made once, at load.

    position [1, 1 + rows * columns, C] -> bicubic over its grid, by the config's pos_embed_mode
    patch weight W [C, channels, p, p]  -> [C, channels, q, q]
        "bicubic": W resized like a picture (OpenGVLab)
        "pi":      pinv(B) W, where B resizes patches of q x q from p x p: the same tokens for a resized picture (timm)

Sources: OpenGVLab/InternVL, segmentation/mmseg_custom/models/backbones/intern_vit_6b.py (its loading of weights);
FlexiViT (Beyer et al. 2023, section 3.4) and timm.layers.resample_patch_embed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvit.geometry import resize_position_embedding

PATCH_RESAMPLING = ("bicubic", "pi")


def resample_patch_embedding(weight: Tensor, patch_size: int, method: str = "bicubic") -> Tensor:
    """The weight of a patch embedding for another patch size.

    "bicubic", as OpenGVLab does it, resizes each filter like a picture: its sum over a patch grows with the number of
    pixels, by (16 / 14)^2 from 14 to 16, so a network that is not trained further sees louder patches. "pi", timm's,
    is the pseudo-inverse of resizing the pixels (bicubic with antialias): a picture that is enlarged with its patches
    gives the tokens it had.

    Args:
        weight: [C, channels, p, p].
        patch_size: the new q; the same size gives the weight back as it is.
        method: one of `PATCH_RESAMPLING`.

    Returns:
        [C, channels, q, q] in weight's dtype, computed in float32 ("pi": its inverse in float64).

    Raises:
        ValueError: another method, a patch_size that is no positive int, a weight that is not square filters.
    """
    if method not in PATCH_RESAMPLING:
        raise ValueError(f"patch_resampling: expected one of {', '.join(PATCH_RESAMPLING)}, got {method!r}")
    if not isinstance(patch_size, int) or isinstance(patch_size, bool) or patch_size < 1:
        raise ValueError(f"patch_size: expected a positive int, got {patch_size!r}")
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight: expected [C, channels, p, p], got {list(weight.shape)}")
    size = weight.shape[-1]
    if patch_size == size:
        return weight
    wide = weight if weight.dtype == torch.float64 else weight.float()
    new = (patch_size, patch_size)
    if method == "bicubic":
        return F.interpolate(wide, size=new, mode="bicubic", align_corners=False).to(weight.dtype)
    pixels = torch.eye(size * size, dtype=torch.float64, device=weight.device).view(-1, 1, size, size)
    resized = F.interpolate(pixels, size=new, mode="bicubic", antialias=True, align_corners=False)
    inverse = torch.linalg.pinv(resized.flatten(1).T)  # [p * p, q * q]
    return (wide.flatten(2) @ inverse.to(wide.dtype)).unflatten(2, new).to(weight.dtype)


@torch.no_grad()
def resize_embeddings(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    patch_resampling: str = "bicubic",
) -> None:
    """Gives a model, in place, the embeddings of another native image size or patch size, and the config that says so.

    At run time a model takes any image size as it is; a native size saves the resizing there, and is what a trained
    position embedding of that size is stored at.

    Args:
        model: with `config` and `embeddings` as `InternViT` has them; the reference too.
        image_size: native (height, width), or one number for both; by default the grid of patches stays.
        patch_size: by default as it is.
        patch_resampling: see `resample_patch_embedding`.

    Raises:
        ValueError: sizes that are no multiple of the patch, or another resampling.
    """
    old: Any = model.config
    patch = old.patch_size if patch_size is None else patch_size
    embeddings: Any = model.embeddings
    weight = resample_patch_embedding(embeddings.patch_embedding.weight, patch, patch_resampling)
    rows, columns = old.grid_size
    config = old.replace(patch_size=patch, image_size=image_size or (rows * patch, columns * patch))
    position = embeddings.position_embedding
    mode = "float32" if old.pos_embed_mode == "static" else old.pos_embed_mode
    resized = resize_position_embedding(position, old.grid_size, config.grid_size, mode)
    embeddings.position_embedding = nn.Parameter(resized.clone(), requires_grad=position.requires_grad)
    if patch != old.patch_size:
        conv = nn.Conv2d(config.num_channels, config.hidden_size, patch, patch, device="meta")
        conv.weight = nn.Parameter(weight, requires_grad=embeddings.patch_embedding.weight.requires_grad)
        conv.bias = embeddings.patch_embedding.bias
        embeddings.patch_embedding = conv
    unchanged = config.replace(name=old.name) == old
    model.config = embeddings.config = old if unchanged else config
