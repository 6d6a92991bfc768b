"""The parts of an InternViT block on the fused ops, under OpenGVLab's names.

`attn.qkv`, `attn.proj`, `mlp.fc1` and `mlp.fc2` are plain `nn.Linear`s, called as modules: LoRA and quantisers attach
there. A fused op replaces a module's forward only where that module is still what was built here.
"""

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from internvit.config import InternViTConfig
from internvit.model import recompute
from internvit.ops import attention, layer_norm, linear_layer_scale, qk_norm_attention_qkvpacked, rms_norm
from internvit.ops.gelu import gelu
from internvit.ops.linear import linear
from internvit.ops.linear_gelu import linear_gelu, linear_gelu_with_pre_activation
from internvit.reference import check_pixels, resize_position_embedding


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def for_linears(y: Tensor, weight: Tensor) -> Tensor:
    """A normed float32 stream in the dtype of 16-bit weights, which the Linears behind the norm have too."""
    return y.to(weight.dtype) if y.dtype == torch.float32 and weight.dtype.itemsize == 2 else y


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; see `internvit.ops.rms_norm`."""

    kind = "rms_norm"
    bias: None = None

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        rounding: str = "fused",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.eps = eps
        self.rounding = rounding

    def forward(self, x: Tensor) -> Tensor:
        return for_linears(rms_norm(x, self.weight, eps=self.eps, rounding=self.rounding), self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, rounding={self.rounding!r}"


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension; see `internvit.ops.layer_norm`."""

    kind = "layer_norm"
    rounding = "fused"

    def __init__(
        self,
        width: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return for_linears(layer_norm(x, self.weight, self.bias, eps=self.eps), self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def make_norm(config: InternViTConfig, rounding: str, **factory: Any) -> RMSNorm | LayerNorm:
    """A block norm of the config's type."""
    if config.norm_type == "rms_norm":
        return RMSNorm(config.hidden_size, config.layer_norm_eps, rounding, **factory)
    return LayerNorm(config.hidden_size, config.layer_norm_eps, **factory)


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether `module` is exactly a `kind`, without hooks or a tensor subclass inside."""
    return type(module) is kind and not has_hooks(module) and _is_plain_tensor(module.weight)


def is_plain_norm(module: nn.Module) -> TypeGuard[RMSNorm | LayerNorm]:
    """Whether `module` is a norm built here whose call a fused op may stand for."""
    return is_plain(module, RMSNorm) or is_plain(module, LayerNorm)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is an `nn.Linear` without hooks, adapters, parametrisation or a tensor subclass inside."""
    return is_plain(module, nn.Linear)


def _is_plain_tensor(t: Any) -> bool:
    return type(t) in (nn.Parameter, Tensor)


def project(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) of a Linear; without gradients, the same bits for an image alone and in any batch."""
    if torch.is_grad_enabled() or not is_plain_linear(module):
        return module(x)
    return linear(x, module.weight, module.bias)


def project_scaled(module: nn.Module, x: Tensor, gamma: Tensor, fold: bool) -> tuple[Tensor, Tensor | None]:
    """The branch that the Linear `module` ends, and the LayerScale still to be applied: None where it is folded in."""
    if fold and torch.is_grad_enabled() and is_plain_linear(module):
        return linear_layer_scale(x, module.weight, gamma, module.bias), None
    return project(module, x), gamma


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), remembered as a recipe for backward where it is one of ours."""
    y = norm(x)
    return remember_norm(norm, x, y) if is_plain_norm(norm) else y


def remember_norm(norm: RMSNorm | LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """Notes that y is norm(x), in y's dtype."""
    if not recompute.active():
        return y
    x_only, dtype = x.detach(), y.dtype
    return recompute.remember(y, lambda: norm(x_only).to(dtype), x, norm.weight, norm.bias)


def fc1_gelu(fc1: nn.Module, x: Tensor) -> Tensor:
    """gelu(fc1(x)), in one op where fc1 is a plain Linear, remembered as a recipe for backward."""
    if not is_plain_linear(fc1):
        return gelu(fc1(x))
    if not recompute.active():
        return linear_gelu(x, fc1.weight, fc1.bias)
    hidden, pre, backend = linear_gelu_with_pre_activation(x, fc1.weight, fc1.bias)
    return recompute.remember(hidden, lambda: gelu(pre, backend=backend), pre)


class Attention(nn.Module):
    """Multi-head attention with optional QK-norm over all heads together; see `internvit.ops.qk_norm_attention`."""

    def __init__(self, config: InternViTConfig, rounding: str = "fused", **factory: Any) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.rounding = rounding
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias, **factory)
        self.proj = nn.Linear(width, width, **factory)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = RMSNorm(width, config.effective_qk_norm_eps, rounding, **factory)
            self.k_norm = RMSNorm(width, config.effective_qk_norm_eps, rounding, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The branch [B, N, C] of normed tokens x [B, N, C]."""
        return project(self.proj, self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """The branch before its last Linear, [B, N, C]."""
        qkv = project(self.qkv, x).unflatten(-1, (3, self.num_heads, self.head_dim))  # [B, N, 3, H, D]
        if not self.qk_normalization:
            out = qk_norm_attention_qkvpacked(qkv)
        elif is_plain_norm(self.q_norm) and is_plain_norm(self.k_norm):
            q_weight, k_weight, eps = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            out = qk_norm_attention_qkvpacked(qkv, q_weight, k_weight, eps=eps, rounding=self.rounding)
        else:
            q, k, v = self._normed_heads(qkv)
            out = attention(q, k, v)
        return out.flatten(2)

    def _normed_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unbind(2)
        if self.qk_normalization:
            q = self.q_norm(q.flatten(2)).view(q.shape).to(v.dtype)
            k = self.k_norm(k.flatten(2)).view(k.shape).to(v.dtype)
        return q, k, v

    def attention_map(self, x: Tensor) -> Tensor:
        """The softmax probabilities [B, H, N, N] for normed tokens x, computed in float32, in x's dtype.

        A diagnostic: it runs the projection once more and holds all scores in memory.
        """
        q, k, _ = self._normed_heads(self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)))
        scores = (q.transpose(1, 2).float() @ k.permute(0, 2, 3, 1).float()) * self.head_dim**-0.5
        return scores.softmax(-1).to(x.dtype)


class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU; see `internvit.ops.linear_gelu`."""

    def __init__(self, config: InternViTConfig, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, **factory)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The branch [B, N, C] of normed tokens x [B, N, C]."""
        return project(self.fc2, self.expand(x))

    def expand(self, x: Tensor) -> Tensor:
        """The branch before its last Linear, [B, N, 4 C]."""
        return fc1_gelu(self.fc1, x)


class Embeddings(nn.Module):
    """The class token and one token per patch, plus the position embedding of the pixels' grid."""

    def __init__(self, config: InternViTConfig, **factory: Any) -> None:
        super().__init__()
        self.config = config
        width, size = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width, **factory))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=size, stride=size, **factory)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_tokens, width, **factory))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tokens [B, 1 + patches, C] of pixels [B, channels, height, width], cast to the weights' dtype."""
        grid = check_pixels(self.config, pixel_values)
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(patches.shape[0], -1, -1).to(patches.dtype)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding_for(grid)

    def position_embedding_for(self, grid: tuple[int, int]) -> Tensor:
        """The position embedding [1, 1 + rows * columns, C] of this grid.

        It is resized at each call: no cache can notice a write through `.data`, which EMA and weight synchronisation
        use. The 300M at 336 x 504, bfloat16, two Zen 4 cores: 11 ms of a forward's 2 s.
        """
        return resize_position_embedding(
            self.position_embedding, self.config.grid_size, grid, self.config.pos_embed_mode
        )
