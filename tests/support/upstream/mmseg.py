"""OpenGVLab's mmseg backbone, segmentation/mmseg_custom/.../intern_vit_6b.py, without flash-attn, apex and the FPN."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.upstream.opengvlab import InternRMSNorm, attend


class RMSNorm(InternRMSNorm):
    """The same code under mmseg's name."""


class LayerScale(nn.Module):
    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False, force_fp32: bool = False) -> None:
        super().__init__()
        self.inplace = inplace
        self.gamma = nn.Parameter(init_values * torch.ones(dim))
        self.force_fp32 = force_fp32

    def forward(self, x: Tensor) -> Tensor:
        if self.force_fp32:
            return (x.float() * self.gamma.float()).to(x.dtype)
        return x.mul_(self.gamma) if self.inplace else x * self.gamma


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_normalization: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)
        self.use_flash_attn = False
        self.qk_normalization = qk_normalization
        self.q_norm = RMSNorm(dim) if qk_normalization else nn.Identity()
        self.k_norm = RMSNorm(dim) if qk_normalization else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return attend(self, x)


class Mlp(nn.Module):
    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x)))))


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        init_values: float,
        drop_path: float,
        qk_normalization: bool,
        with_cp: bool,
        layerscale_force_fp32: bool,
    ) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_normalization)
        self.ls1 = LayerScale(dim, init_values, force_fp32=layerscale_force_fp32)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = RMSNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values, force_fp32=layerscale_force_fp32)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        def _inner_forward(x: Tensor) -> Tensor:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

        if self.with_cp and x.requires_grad:
            return checkpoint(_inner_forward, x, use_reentrant=False)
        return _inner_forward(x)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> tuple[Tensor, int, int]:
        x = self.proj(x)
        _, _, H, W = x.shape
        return x.flatten(2).transpose(1, 2), H, W


class InternViT6B(nn.Module):
    def __init__(
        self,
        in_chans: int = 3,
        patch_size: int = 14,
        img_size: int = 224,
        qkv_bias: bool = False,
        drop_path_rate: float = 0.0,
        embed_dim: int = 3200,
        num_heads: int = 25,
        mlp_ratio: float = 4,
        init_values: float = 0.1,
        qk_normalization: bool = True,
        depth: int = 48,
        with_cp: bool = True,
        layerscale_force_fp32: bool = False,
        out_indices: tuple[int, ...] = (7, 11, 15, 23),
    ) -> None:
        super().__init__()
        self.out_indices = out_indices
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        rates = [rate.item() for rate in torch.linspace(0, drop_path_rate, depth)]
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                init_values,
                rate,
                qk_normalization,
                with_cp,
                layerscale_force_fp32,
            )
            for rate in rates
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, H, W = self.patch_embed(x.type(self.patch_embed.proj.weight.dtype))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        features = []
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.out_indices:
                features.append(x[:, 1:].transpose(1, 2).reshape(len(x), -1, H, W).contiguous().float())
        return features


class WindowedAttention(Attention):
    """The name of the detection backbone's attention over windows."""

    def __init__(self, *args, window_size: int = 2, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.window_size = window_size
