"""The vision tower's block of Intern-S1's remote code (internlm/Intern-S1, modeling_interns1.py), eager attention."""

import torch
from torch import Tensor, nn


class InternS1VisionDropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep_prob = 1 - self.drop_prob
        kept = (keep_prob + torch.rand((x.shape[0], 1, 1), dtype=x.dtype, device=x.device)).floor_()
        return x.div(keep_prob) * kept


class InternS1VisionRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * y.to(x.dtype)


class InternS1VisionAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads, self.scale, self.attention_dropout = num_heads, (width // num_heads) ** -0.5, 0.0
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=not qk_norm) for _ in range(3))
        self.projection_layer = nn.Linear(width, width)
        self.projection_dropout = nn.Identity()
        self.q_norm = InternS1VisionRMSNorm(width) if qk_norm else nn.Identity()
        self.k_norm = InternS1VisionRMSNorm(width) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(2, 3) * self.scale).softmax(-1)
        return self.projection_dropout(self.projection_layer((weights @ v).transpose(1, 2).flatten(2))), weights


class InternS1VisionMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.activation_fn = nn.GELU()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_fn(self.fc1(x)))


class InternS1VisionLayer(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int, norm_type: str, drop_path_rate: float) -> None:
        super().__init__()
        norm = nn.LayerNorm if norm_type == "layer_norm" else InternS1VisionRMSNorm
        self.attention = InternS1VisionAttention(width, num_heads, norm_type == "rms_norm")
        self.mlp = InternS1VisionMLP(width, hidden)
        self.layernorm_before, self.layernorm_after = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.lambda_1, self.lambda_2 = (nn.Parameter(0.1 * torch.ones(width)) for _ in range(2))
        self.dropout = nn.Dropout(0.0)
        self.drop_path1, self.drop_path2 = (InternS1VisionDropPath(drop_path_rate) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop_path1(self.lambda_1 * self.attention(self.layernorm_before(x))[0]) + x
        return self.drop_path2(self.lambda_2 * self.dropout(self.mlp(self.layernorm_after(x)))) + x
