"""The visual resolution router of InternVL3.5-Flash: which tiles the language model gets at a quarter of the tokens.

    pooled = a learned query that attends to a tile's tokens four times            [B, N, C] -> [B, C]
    logits = four residual MLP blocks, each with a LayerNorm at its end, and a Linear   [B, C] -> [B, 2]
    compress = p > quantile(p, relative_threshold) and p >= absolute_threshold,   p = softmax(logits)[:, 0]

The second attention and its norm run three times: upstream's code has a third and a fourth of both, which its
checkpoints hold, and does not call them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from internvit.model.fused_block import linear_invariant
from internvit.model.hooks import has_hooks, is_exactly
from internvit.multimodal.fused_sequential import run_sequential

_DROPOUT = 0.1
_UNUSED = ("attn3", "norm3", "attn4", "norm4")


class CrossAttentionPooling(nn.Module):
    """One vector of a tile's tokens: `norm_i(attn_i(query, tokens, tokens))` four times, for i = 1, 2, 2, 2.

    Args:
        dim: C, the width of the tokens.
        num_heads: of each attention.
        device, dtype: of the parameters.

    With a single query, keys and values of all tokens are not needed: the query goes through the transposed key
    projection instead, and the mean of the tokens that a head takes goes through its value projection,

        scores = q_h (W_k_h x)^T = (q_h W_k_h) x^T          mean_j p_j (W_v_h x_j) = W_v_h (mean_j p_j x_j)

    so that an attention costs 2 N H C multiply-adds instead of 2 N C^2: 64 times fewer at C = 1024 and 16 heads. The
    key bias adds one number to all scores of a head, which softmax takes away.

    Source: CrossAttentionPooling in modeling_internvl_chat.py of OpenGVLab/InternVL3_5-8B-Flash.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query_token = nn.Parameter(torch.randn(1, dim, **factory))
        for i in range(1, 5):
            self.add_module(f"attn{i}", nn.MultiheadAttention(dim, num_heads, batch_first=True, **factory))
            self.add_module(f"norm{i}", nn.LayerNorm(dim, **factory))
        for name in _UNUSED:  # DistributedDataParallel waits for the gradient of every parameter that has one
            self.get_submodule(name).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, 1, C] of tokens [B, N, C]."""
        tokens = tokens.to(self.query_token.dtype)
        pooled = self.query_token.expand(tokens.shape[0], 1, -1)
        for i in (1, 2, 2, 2):
            attention: Any = self.get_submodule(f"attn{i}")
            norm = self.get_submodule(f"norm{i}")
            pooled = run_sequential([norm], _attend(attention, pooled, tokens))
        return pooled


def _attend(attention: nn.MultiheadAttention, query: Tensor, tokens: Tensor) -> Tensor:
    """attention(query, tokens, tokens) [B, 1, C] of one query [B, 1, C] for each tile."""
    if not is_exactly(attention, nn.MultiheadAttention) or has_hooks(attention.out_proj):
        return attention(query, tokens, tokens, need_weights=False)[0]
    heads = attention.num_heads
    q_weight, k_weight, v_weight = attention.in_proj_weight.chunk(3)
    q_bias, _, v_bias = attention.in_proj_bias.chunk(3)
    q = linear_invariant(query, q_weight, q_bias).unflatten(-1, (heads, -1)).squeeze(1)  # [B, H, D]
    q_absorbed = _per_head(q, k_weight.unflatten(0, (heads, -1)))  # [B, H, C]
    scale = q.shape[-1] ** -0.5
    x = tokens.unsqueeze(1)
    mean = F.scaled_dot_product_attention(q_absorbed.unsqueeze(1), x, x, scale=scale).squeeze(1)  # [B, H, C]
    values = _per_head(mean, v_weight.unflatten(0, (heads, -1)).mT).flatten(1).unsqueeze(1) + v_bias  # [B, 1, C]
    return linear_invariant(values, attention.out_proj.weight, attention.out_proj.bias)


def _per_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, H, K] with a matrix for each head, [H, K, M]: [B, H, M]; without gradients, each image by itself."""
    if torch.is_grad_enabled() or x.shape[0] == 0:
        return torch.einsum("bhk,hkm->bhm", x, weight)
    return torch.stack([torch.bmm(image.unsqueeze(1), weight).squeeze(1) for image in x])


class Gating(nn.Module):
    """Logits [B, 1, 2] of pooled tokens [B, 1, C]: for few tokens, and for many.

    Args:
        hidden_size: C.
        expansion_factor: of the MLPs' inner width.
        device, dtype: of the parameters.

    Source: Gating in modeling_internvl_chat.py of OpenGVLab/InternVL3_5-8B-Flash.
    """

    def __init__(
        self,
        hidden_size: int,
        expansion_factor: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = hidden_size * expansion_factor
        for i in range(1, 5):
            block = nn.Sequential(
                nn.Linear(hidden_size, inner, **factory),
                nn.GELU(),
                nn.Dropout(_DROPOUT),
                nn.Linear(inner, hidden_size, **factory),
                nn.Dropout(_DROPOUT),
                nn.LayerNorm(hidden_size, **factory),
            )
            self.add_module(f"block{i}", block)
        self.gate = nn.Sequential(nn.LayerNorm(hidden_size, **factory), nn.Linear(hidden_size, 2, **factory))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            block: Any = self.get_submodule(f"block{i}")
            x = x + run_sequential(block, x)
        return run_sequential(self.gate, x)


def tiles_to_compress(
    probabilities: Tensor, num_tiles: Sequence[int], relative_threshold: float, absolute_threshold: float
) -> Tensor:
    """Which tiles get few tokens: more probable than a quantile of their sample's tiles, and than a threshold.

    A sample's only tile is its own quantile, and keeps all tokens.

    Args:
        probabilities: [B], the router's for few tokens.
        num_tiles: of each sample (a prompt with its images); upstream takes one sample at a time.
        relative_threshold: the quantile, in [0, 1].
        absolute_threshold: the least probability.

    Returns:
        bool [B].

    Source: generate_flash in modeling_internvl_chat.py of OpenGVLab/InternVL3_5-8B-Flash.
    """
    probabilities = probabilities.detach().float()
    samples = [tiles for tiles in probabilities.split(list(num_tiles)) if len(tiles)]
    compress = [
        (tiles > torch.quantile(tiles, relative_threshold)) & (tiles >= absolute_threshold) for tiles in samples
    ]
    return torch.cat(compress) if compress else torch.zeros_like(probabilities, dtype=torch.bool)
