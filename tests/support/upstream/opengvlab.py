"""OpenGVLab's remote code, internvl_chat/.../modeling_intern_vit.py, without flash-attn and apex."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from internvit import InternViTConfig, InternViTOutput


class InternRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = hidden_states.dtype
        wide = hidden_states if dtype == torch.float64 else hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(dtype)


NORM2FN = {"rms_norm": InternRMSNorm, "layer_norm": nn.LayerNorm}


class InternVisionEmbeddings(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=size, stride=size)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_tokens, width))

    def _get_pos_embed(self, pos_embed: Tensor, rows: int, columns: int) -> Tensor:
        dtype = pos_embed.dtype
        grid = pos_embed.float().unflatten(1, self.config.grid_size).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(dtype)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values)
        batch, _, rows, columns = patches.shape
        dtype = self.patch_embedding.weight.dtype
        tokens = torch.cat([self.class_embedding.expand(batch, 1, -1).to(dtype), patches.flatten(2).mT], dim=1)
        position = self.position_embedding
        position = torch.cat([position[:, :1], self._get_pos_embed(position[:, 1:], rows, columns)], dim=1)
        return tokens + position.to(dtype)


def attend(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """Attention with QK-norm over all heads, by the parts of `module`."""
    B, N, C = hidden_states.shape
    qkv = module.qkv(hidden_states).reshape(B, N, 3, module.num_heads, C // module.num_heads).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    if module.qk_normalization:
        q = module.q_norm(q.transpose(1, 2).flatten(-2, -1)).view(B, N, module.num_heads, -1).transpose(1, 2)
        k = module.k_norm(k.transpose(1, 2).flatten(-2, -1)).view(B, N, module.num_heads, -1).transpose(1, 2)
    attention = module.attn_drop(((q * module.scale) @ k.transpose(-2, -1)).softmax(dim=-1))
    return module.proj_drop(module.proj((attention @ v).transpose(1, 2).reshape(B, N, C)))


class InternAttention(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.embed_dim = width
        self.num_heads = config.num_attention_heads
        self.use_flash_attn = False
        self.head_dim = width // self.num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.attn_drop = nn.Dropout(0.0)
        self.proj_drop = nn.Dropout(0.0)
        self.qk_normalization = config.qk_normalization
        if self.qk_normalization:
            self.q_norm = InternRMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm = InternRMSNorm(width, eps=config.layer_norm_eps)
        self.proj = nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return attend(self, hidden_states)


class InternMLP(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        self.act = nn.GELU()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class InternVisionEncoderLayer(nn.Module):
    def __init__(self, config: InternViTConfig, drop_path_rate: float) -> None:
        super().__init__()
        width, norm = config.hidden_size, NORM2FN[config.norm_type]
        self.embed_dim = width
        self.intermediate_size = config.intermediate_size
        self.norm_type = config.norm_type
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = norm(width, eps=config.layer_norm_eps)
        self.norm2 = norm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(width))
        self.drop_path1 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()
        self.drop_path2 = DropPath(drop_path_rate) if drop_path_rate > 0.0 else nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        x = x + self.drop_path1(self.attn(self.norm1(x).to(x.dtype)) * self.ls1)
        return x + self.drop_path2(self.mlp(self.norm2(x).to(x.dtype)) * self.ls2)


class InternVisionEncoder(nn.Module):
    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        rates = [rate.item() for rate in torch.linspace(0, config.drop_path_rate, config.num_hidden_layers)]
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config, rate) for rate in rates)
        self.gradient_checkpointing = True

    def forward(self, inputs_embeds: Tensor, output_hidden_states: bool = False) -> InternViTOutput:
        encoder_states = [inputs_embeds]
        for encoder_layer in self.layers:
            if self.gradient_checkpointing and self.training:
                encoder_states.append(checkpoint(encoder_layer, encoder_states[-1], use_reentrant=False))
            else:
                encoder_states.append(encoder_layer(encoder_states[-1]))
        last = encoder_states[-1]
        return InternViTOutput(last, last[:, 0], tuple(encoder_states) if output_hidden_states else None)


class InternVisionModel(nn.Module):
    main_input_name = "pixel_values"
    _no_split_modules = ("InternVisionEncoderLayer",)

    def __init__(self, config: InternViTConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)

    def forward(self, pixel_values: Tensor, output_hidden_states: bool = False) -> InternViTOutput:
        return self.encoder(self.embeddings(pixel_values), output_hidden_states)


class InternVLChatModel(nn.Module):
    """The vision half of upstream's chat model (modeling_internvl_chat.py)."""

    def __init__(self, config: InternViTConfig, llm_hidden_size: int, ps_version: str = "v2") -> None:
        super().__init__()
        self.vision_model = InternVisionModel(config)
        self.select_layer = -1
        self.downsample_ratio = 0.5
        self.ps_version = ps_version
        width = config.hidden_size * int(1 / self.downsample_ratio) ** 2
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, llm_hidden_size),
            nn.GELU(),
            nn.Linear(llm_hidden_size, llm_hidden_size),
        )

    def pixel_shuffle(self, x: Tensor, scale_factor: float = 0.5) -> Tensor:
        n, w, h, c = x.size()
        x = x.view(n, w, int(h * scale_factor), int(c / scale_factor))
        x = x.permute(0, 2, 1, 3).contiguous()
        x = x.view(n, int(h * scale_factor), int(w * scale_factor), int(c / (scale_factor * scale_factor)))
        return x if self.ps_version == "v1" else x.permute(0, 2, 1, 3).contiguous()

    def extract_feature(self, pixel_values: Tensor) -> Tensor:
        if self.select_layer == -1:
            features = self.vision_model(pixel_values).last_hidden_state
        else:
            features = self.vision_model(pixel_values, output_hidden_states=True).hidden_states[self.select_layer]
        features = features[:, 1:, :]
        side = int(features.shape[1] ** 0.5)
        features = self.pixel_shuffle(features.reshape(features.shape[0], side, side, -1), self.downsample_ratio)
        return self.mlp1(features.reshape(features.shape[0], -1, features.shape[-1]))
