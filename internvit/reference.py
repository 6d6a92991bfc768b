"""InternViT in plain PyTorch: the specification that everything else here is measured against.

    x = [class, conv(pixels)] + position
    x = x + drop_path(attention(norm1(x)) * ls1)         for each of L blocks
    x = x + drop_path(mlp(norm2(x)) * ls2)

Parameter names, rounding and order of operations are OpenGVLab's (modeling_intern_vit.py in OpenGVLab/InternVL,
internvl_chat); where transformers (models/internvl/modeling_internvl.py), timm or mmseg compute otherwise, `Numerics`
and `config.pos_embed_mode` switch. Nothing here is fused or fast; it is meant to be read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from internvit.config import InternViTConfig
from internvit.geometry import check_pixels, resize_position_embedding
from internvit.output import InternViTOutput, attention_kind


@dataclass(frozen=True)
class Numerics:
    """The upstream differences that change bits of 16-bit results.

    Attributes:
        weight_before_cast: RMSNorm multiplies by its weight in float32 and casts then (SGLang, LightLLM, lmdeploy);
            else it casts first (OpenGVLab, apex, transformers, mmseg). 26 % of bfloat16 outputs differ by one ulp.
        promote_norm: a float32 norm weight beside 16-bit activations leaves the norm's output in float32 (mmseg);
            else it goes back to the activations' dtype (OpenGVLab).
        scale_scores: the scores are scaled (transformers, flash-attention); else the queries before the product
            (OpenGVLab, timm), which rounds when the scale is no power of two, as for head_dim 128.
        float32_softmax: scores and softmax stay in float32 (flash-attention, SDPA); else the scores are rounded to the
            activations' dtype.
    """

    weight_before_cast: bool = False
    promote_norm: bool = False
    scale_scores: bool = False
    float32_softmax: bool = False


OPENGVLAB = Numerics()
TRANSFORMERS = Numerics(scale_scores=True)
SDPA = Numerics(scale_scores=True, float32_softmax=True)
MMSEG = Numerics(promote_norm=True, scale_scores=True, float32_softmax=True)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight, statistics in float32."""

    def __init__(self, width: int, eps: float, numerics: Numerics = OPENGVLAB) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        x_hat = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        y = x_hat * self.weight if self.numerics.weight_before_cast else self.weight * x_hat.to(x.dtype)
        return y if self.numerics.promote_norm and not self.numerics.weight_before_cast else y.to(x.dtype)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v, with RMSNorm of q and of k over all heads together first."""

    def __init__(self, config: InternViTConfig, numerics: Numerics) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.numerics = numerics
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        if config.qk_normalization:
            self.q_norm = RMSNorm(width, config.effective_qk_norm_eps, numerics)
            self.k_norm = RMSNorm(width, config.effective_qk_norm_eps, numerics)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The branch [B, N, C] and the attention map [B, H, N, N]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [B, N, C] each
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, H, N, D]
        scale = q.shape[-1] ** -0.5
        if self.numerics.float32_softmax and q.dtype != torch.float64:
            q, k = q.float(), k.float()
        scores = (q @ k.transpose(-1, -2)) * scale if self.numerics.scale_scores else (q * scale) @ k.transpose(-1, -2)
        attention = scores.softmax(-1).to(v.dtype)
        return self.proj((attention @ v).transpose(1, 2).flatten(2)), attention


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path_scale(batch: int, rate: float, device: torch.device) -> Tensor:
    """The factor of each image's branch, [B] float32: 0 with probability `rate`, else 1 / (1 - rate)."""
    keep = 1.0 - rate
    return torch.empty(batch, device=device).bernoulli_(keep).div_(keep)


class Layer(nn.Module):
    """One pre-norm block with LayerScale and DropPath."""

    def __init__(self, config: InternViTConfig, drop_path_rate: float, numerics: Numerics) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        rms = config.norm_type == "rms_norm"
        self.norm1 = RMSNorm(width, eps, numerics) if rms else nn.LayerNorm(width, eps)
        self.attn = Attention(config, numerics)
        self.norm2 = RMSNorm(width, eps, numerics) if rms else nn.LayerNorm(width, eps)
        self.mlp = MLP(config)
        self.ls1 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.drop_path_rate = drop_path_rate

    def drop_path(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path_rate == 0:
            return branch
        scale = drop_path_scale(len(branch), self.drop_path_rate, branch.device)
        return branch * scale.to(branch.dtype)[:, None, None]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output [B, N, C] and its attention map [B, H, N, N]."""
        branch, attention = self.attn(self.norm1(x))
        x = x + self.drop_path(branch * self.ls1).to(x.dtype)
        x = x + self.drop_path(self.mlp(self.norm2(x)) * self.ls2).to(x.dtype)
        return x, attention


class Embeddings(nn.Module):
    """The class token and one token per patch, plus the position embedding."""

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=size, stride=size)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_tokens, width))

    def forward(self, pixel_values: Tensor) -> Tensor:
        grid = check_pixels(self.config, pixel_values)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], dim=1)
        native, mode = self.config.grid_size, self.config.pos_embed_mode
        return x + resize_position_embedding(self.position_embedding, native, grid, mode)


class Encoder(nn.Module):
    def __init__(self, config: InternViTConfig, numerics: Numerics) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, rate, numerics) for rate in config.drop_path_rates())


class InternViT(nn.Module):
    """InternViT as specified; the same parameter names and call as `internvit.InternViT`.

    Args:
        config: the architecture.
        numerics: which upstream's rounding to follow.
    """

    def __init__(self, config: InternViTConfig, numerics: Numerics = OPENGVLAB) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, numerics)
        self.gradient_checkpointing = False

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        pixel_embeds: Tensor | None = None,
        output_attentions: bool | str = False,
    ) -> InternViTOutput | tuple:
        """Features of pixel_values [B, channels, height, width], or of already embedded tokens [B, N, C]."""
        if (pixel_values is None) == (pixel_embeds is None):
            raise ValueError(
                "give either pixel_values or pixel_embeds, got " + ("none" if pixel_embeds is None else "both")
            )
        x = self.embeddings(pixel_values) if pixel_embeds is None else pixel_embeds
        hidden_states, attentions = [x], []
        kind = attention_kind(output_attentions)
        for layer in self.encoder.layers:
            if self.gradient_checkpointing and self.training:
                x, attention = checkpoint(layer, x, use_reentrant=False)
            else:
                x, attention = layer(x)
            if output_hidden_states:
                hidden_states.append(x)
            if kind == "columns":
                attentions.append(attention.sum(-2, dtype=torch.promote_types(attention.dtype, torch.float32)))
            elif kind is not None:
                attentions.append(attention[:, :, 0] if kind == "class" else attention)
        output = InternViTOutput(
            last_hidden_state=x,
            pooler_output=x[:, 0],
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if kind is not None else None,
        )
        return output if return_dict else output.to_tuple()
