"""The parts of an InternViT block on the fused ops, under OpenGVLab's names.

`attn.qkv`, `attn.proj`, `mlp.fc1` and `mlp.fc2` are plain `nn.Linear`s, called as modules: LoRA and quantisers attach
there. A fused op replaces a module's forward only where that module is still what was built here.
"""

from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvit.config import InternViTConfig
from internvit.model.attention_summary import AttentionSummary
from internvit.model.fused_block import AttentionParts, Norm, attention_output, fc1_gelu, linear_per_image, norm_heads
from internvit.model.hooks import fusible_class, is_plain, is_plain_linear
from internvit.ops import attention_column_sums
from internvit.ops.core.sequences import Sequences


@fusible_class
class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; see `internvit.ops.rms_norm`."""

    norm_type = "rms_norm"
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
        return _as_norm(self).compute(x)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, rounding={self.rounding!r}"


@fusible_class
class LayerNorm(nn.Module):
    """LayerNorm over the last dimension; see `internvit.ops.layer_norm`."""

    norm_type = "layer_norm"
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
        return _as_norm(self).compute(x)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def make_norm(config: InternViTConfig, rounding: str, **factory: Any) -> RMSNorm | LayerNorm:
    """A block norm of the config's type."""
    if config.norm_type == "rms_norm":
        return RMSNorm(config.hidden_size, config.layer_norm_eps, rounding, **factory)
    return LayerNorm(config.hidden_size, config.layer_norm_eps, **factory)


def is_plain_norm(module: nn.Module) -> TypeGuard[RMSNorm | LayerNorm]:
    """Whether `module` is a norm built here whose call a fused op may stand for."""
    return is_plain(module, RMSNorm) or is_plain(module, LayerNorm)


def _as_norm(module: RMSNorm | LayerNorm) -> Norm:
    return Norm(module.norm_type, module.weight, module.bias, module.eps, module.rounding)


def fusible(module: nn.Module) -> Norm | nn.Module:
    """A norm's parameters where a fused op may stand for it; else the module, to be called."""
    return _as_norm(module) if is_plain_norm(module) else module


def norm_before(linear: Any, module: nn.Module) -> Norm | nn.Module:
    """`fusible` of the norm before `linear`: a norm kept in float32 writes the dtype of 16-bit weights behind it."""
    norm, weight = fusible(module), getattr(linear, "weight", None)
    if not isinstance(norm, Norm) or not isinstance(weight, Tensor) or weight.dtype == norm.weight.dtype:
        return norm
    wide = weight.is_floating_point() and weight.dtype.itemsize >= 2
    return norm._replace(linear_dtype=weight.dtype) if wide else norm


@fusible_class
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

    def forward(self, x: Tensor, sequences: Sequences | None = None) -> Tensor:
        """The branch [B, N, C] of normed tokens x [B, N, C], or [total, C] of packed images."""
        return linear_per_image(self.proj, attention_output(self.parts(sequences), x))

    def attention_output(self, x: Tensor) -> Tensor:
        """The branch before its last Linear, [B, N, C]."""
        return attention_output(self.parts(), x)

    def parts(self, sequences: Sequences | None = None, summary: AttentionSummary | None = None) -> AttentionParts:
        """What `attention_output` computes with."""
        qkv = (partial(linear_per_image, self.qkv),)
        settings: dict[str, Any] = {"scale": self.head_dim**-0.5, "rounding": self.rounding}
        parts = AttentionParts(qkv, self.num_heads, **settings, sequences=sequences, summary=summary)
        if not self.qk_normalization:
            return parts
        return parts._replace(q_norm=fusible(self.q_norm), k_norm=fusible(self.k_norm))

    def attention_map(self, x: Tensor, kind: str = "maps") -> Tensor:
        """The softmax probabilities [B, H, N, N] for normed tokens x, computed in float32, in x's dtype.

        It runs the projection once more, and holds all scores in memory. With `kind` "class" it is the class token's
        row alone, with "columns" the sums over the columns in float32, [B, H, N], without the other scores. A block
        that is called as a whole has these from here; others report them themselves (`AttentionSummary`).
        """
        class_only = kind == "class"
        q, k = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in self._queries_and_keys(x, class_only))
        if self.qk_normalization:
            q, k, _ = norm_heads(self.q_norm, self.k_norm, q, k, k)
        if kind == "columns":
            return attention_column_sums(q, k)
        scores = (q.transpose(1, 2).float() @ k.permute(0, 2, 3, 1).float()) * self.head_dim**-0.5
        probabilities = scores.softmax(-1).to(x.dtype)
        return probabilities[:, :, 0] if class_only else probabilities

    def _queries_and_keys(self, x: Tensor, class_only: bool) -> tuple[Tensor, Tensor]:
        """q and k [B, N, C] of normed tokens x; with `class_only` q is [B, 1, C]."""
        if not class_only or not is_plain_linear(self.qkv):
            q, k, _ = self.qkv(x).chunk(3, -1)
            return q[:, : 1 if class_only else None], k
        q_weight, k_weight, _ = self.qkv.weight.chunk(3)
        q_bias, k_bias, _ = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        return F.linear(x[:, :1], q_weight, q_bias), F.linear(x, k_weight, k_bias)


@fusible_class
class MLP(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU; see `internvit.ops.linear_gelu`."""

    def __init__(self, config: InternViTConfig, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, **factory)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """The branch [B, N, C] of normed tokens x [B, N, C]."""
        return linear_per_image(self.fc2, fc1_gelu(self.fc1, x))
