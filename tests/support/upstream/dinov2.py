"""The block of facebookresearch/dinov2 (dinov2/layers/block.py, attention.py, mlp.py), without xformers."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.upstream.mmseg import LayerScale


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.drop_prob)
        return x * kept.div_(1 - self.drop_prob)


class MemEffAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class SwiGLUFFNFused(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * up)


class NestedTensorBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, drop_path: float = 0.0, ffn: type = Mlp) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = MemEffAttention(dim, num_heads), ffn(dim, hidden)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.sample_drop_ratio = drop_path

    def forward(self, x_or_x_list: Any) -> Any:
        if isinstance(x_or_x_list, list):
            return [self._forward(x) for x in x_or_x_list]
        return self._forward(x_or_x_list)

    def _forward(self, x: Tensor) -> Tensor:
        attended, transformed = (
            lambda x: self.ls1(self.attn(self.norm1(x))),
            lambda x: self.ls2(self.mlp(self.norm2(x))),
        )
        for branch in (attended, transformed):
            if self.training and self.sample_drop_ratio > 0.1:
                x = self._on_a_subset(x, branch)
            else:
                x = x + self.drop_path1(branch(x))  # upstream's line for both branches
        return x

    def _on_a_subset(self, x: Tensor, branch: Any) -> Tensor:
        count = max(int(x.shape[0] * (1 - self.sample_drop_ratio)), 1)
        kept = torch.randperm(x.shape[0], device=x.device)[:count]
        scale = x.shape[0] / count
        return x.index_add(0, kept, branch(x[kept]), alpha=scale)
