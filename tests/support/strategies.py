"""Hypothesis strategies and random weights that several tests share."""

import torch
from hypothesis import strategies as st

from internvit.config import POS_EMBED_MODES, InternViTConfig


@st.composite
def configs(draw: st.DrawFn) -> InternViTConfig:
    """Any valid configuration, small."""
    heads, patch = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 14, 16]))
    side = st.integers(1, 4).map(lambda n: n * patch)
    eps = st.floats(1e-12, 1e-2)
    return InternViTConfig(
        num_channels=draw(st.integers(1, 4)),
        patch_size=patch,
        image_size=draw(st.one_of(side, st.tuples(side, side))),
        hidden_size=heads * draw(st.integers(1, 8)),
        num_hidden_layers=draw(st.integers(0, 3)),
        num_attention_heads=heads,
        intermediate_size=draw(st.integers(1, 32)),
        norm_type=draw(st.sampled_from(["rms_norm", "layer_norm"])),
        layer_norm_eps=draw(eps),
        qkv_bias=draw(st.booleans()),
        qk_normalization=draw(st.booleans()),
        qk_norm_eps=draw(st.one_of(st.none(), eps)),
        drop_path_rate=draw(st.floats(0, 0.9)),
        initializer_factor=draw(st.floats(-2, 2)),
        initializer_range=draw(st.floats(0, 1)),
        pos_embed_mode=draw(st.sampled_from(POS_EMBED_MODES)),
        name=draw(st.one_of(st.none(), st.text(max_size=5))),
    )


def random_weights(
    config: InternViTConfig, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A state dict under OpenGVLab's names, every element random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in config.parameter_shapes().items()
    }
