"""The router of OpenGVLab's InternVL3.5-Flash (its modeling_internvl_chat.py), said again in plain modules."""

import torch
from torch import Tensor, nn

from internvit import InternViTConfig
from tests.support.upstream.opengvlab import InternVLChatModel


class Pooling(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query_token = nn.Parameter(torch.randn(1, width))
        for i in "1234":
            setattr(self, f"attn{i}", nn.MultiheadAttention(width, heads, batch_first=True))
            setattr(self, f"norm{i}", nn.LayerNorm(width))

    def forward(self, tokens: list[Tensor]) -> Tensor:
        """[B, C] of B lists of tokens; padded, and the padding masked."""
        keys = nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(self.query_token.dtype)
        lengths = torch.tensor([len(t) for t in tokens])
        masked = torch.arange(keys.shape[1])[None] >= lengths[:, None]
        out = self.query_token.repeat(len(tokens), 1, 1)
        out = self.norm1(self.attn1(out, keys, keys, key_padding_mask=masked)[0])
        for _ in range(3):  # attn3, norm3, attn4 and norm4 are in the checkpoint and never called
            out = self.norm2(self.attn2(out, keys, keys, key_padding_mask=masked)[0])
        return out[:, 0]


def residual_mlp(width: int) -> nn.Sequential:
    inner = 4 * width
    return nn.Sequential(
        nn.Linear(width, inner), nn.GELU(), nn.Dropout(0.1), nn.Linear(inner, width), nn.Dropout(0.1),
        nn.LayerNorm(width),
    )  # fmt: skip


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block1, self.block2, self.block3, self.block4 = (residual_mlp(width) for _ in range(4))
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block1, self.block2, self.block3, self.block4):
            x = x + block(x)
        return self.gate(x).softmax(-1)


class InternVLFlashChatModel(InternVLChatModel):
    """The vision half of the chat model; `flash_features` is what generate_flash puts into one prompt."""

    def __init__(self, config: InternViTConfig, llm_hidden_size: int, heads: int, relative: float, absolute: float):
        super().__init__(config, llm_hidden_size)
        wide, width = 2 * llm_hidden_size, config.hidden_size
        self.mlp2 = nn.Sequential(
            nn.LayerNorm(16 * width), nn.Linear(16 * width, wide), nn.GELU(), nn.Dropout(0.1), nn.Linear(wide, wide),
            nn.GELU(), nn.Dropout(0.1), nn.Linear(wide, llm_hidden_size),
        )  # fmt: skip
        self.pooling_before_gating = Pooling(width, heads)
        self.gating = Gate(width)
        self.relative, self.absolute = relative, absolute

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Few tokens and many of each tile, and the gate's probability of few, of tokens [B, N, C]."""
        side = int(tokens.shape[1] ** 0.5)
        grids = tokens.reshape(len(tokens), side, side, -1)
        few = self.pixel_shuffle(grids, self.downsample_ratio**2)
        many = self.pixel_shuffle(grids, self.downsample_ratio)
        gate = self.gating(self.pooling_before_gating(list(tokens)))
        return self.mlp2(few.flatten(1, 2)), self.mlp1(many.flatten(1, 2)), gate[:, 0]

    def flash_features(self, pixel_values: Tensor) -> tuple[list[Tensor], Tensor]:
        few, many, gate = self.route(self.vision_model(pixel_values).last_hidden_state[:, 1:])
        compress = (gate > torch.quantile(gate.float(), self.relative)) & (gate >= self.absolute)
        return [few[i] if compress[i] else many[i] for i in range(len(gate))], compress
