"""Which blocks `internvit.patch` fuses, by their structure, and which it leaves."""

import pytest
import torch
from torch import Tensor, nn

import internvit
from internvit import PatchHandle
from internvit.numerics import relative_error
from tests.support.models import CONFIGS, features
from tests.support.upstream import mmseg
from tests.upstream.test_patch import upstream


def test_what_cannot_be_patched_says_why() -> None:
    model, _ = upstream("opengvlab-rms_norm")
    internvit.patch(model)
    with pytest.raises(ValueError, match=r"it is patched already, at encoder\.layers\.0"):
        internvit.patch(model)
    with pytest.raises(ValueError, match="got none in Linear"):
        internvit.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module, got str"):
        internvit.patch("model")
    with pytest.raises(ValueError, match="expected a patched model, got a Linear"):
        PatchHandle.of(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="which is fused as it is"):
        internvit.patch(internvit.InternViT(CONFIGS["tiny-rms_norm"]))


def test_blocks_that_compute_something_else_are_left() -> None:
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    for change, reason in (
        ({"qk_norm": True}, "not an RMSNorm over the whole width"),
        ({"scale_attn_norm": True}, "it has attn.norm"),
        ({"act_layer": nn.ReLU}, "not the exact"),
        ({"act_layer": lambda: nn.GELU(approximate="tanh")}, "not the exact"),
        ({"norm_layer": lambda dim, **_: nn.GroupNorm(1, dim)}, "is a GroupNorm"),
    ):
        with pytest.raises(ValueError, match=reason):
            internvit.patch(VisionTransformer(**sizes, init_values=0.1, **change))
    model, pixels = upstream("mmseg-rms_norm")
    expected = features(model, pixels)
    windowed = mmseg.WindowedAttention(96, 4, False, True)
    windowed.load_state_dict(model.blocks[1].attn.state_dict())
    model.blocks[1].attn = windowed
    model.blocks[2].mlp.extra = nn.Linear(2, 2)
    handle = internvit.patch(model)
    assert handle.fused == ["blocks.0"]
    assert (
        handle.left["blocks.1"] == "attn is a Attention, expected Attention" or "window_size" in handle.left["blocks.1"]
    )
    assert handle.left["blocks.2"] == "it has a part that is not known here, mlp.extra"
    assert relative_error(features(model, pixels), expected) <= 1e-5


def test_timm_without_layer_scale_and_with_registers() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=3, reg_tokens=4
    ).eval()
    pixels = torch.randn(2, 3, 28, 28)
    expected = model(pixels)
    mask = torch.ones(9, 9).tril().bool()
    masked = model.forward_features(pixels, attn_mask=mask)
    assert not internvit.patch(model).left
    assert relative_error(model(pixels), expected) <= 1e-5
    assert torch.equal(model.forward_features(pixels, attn_mask=mask), masked), "a mask is for the block's own forward"


def test_timms_own_model_is_known() -> None:
    import timm

    model = timm.create_model("vit_intern300m_patch14_448", depth=1, device="meta")
    assert internvit.patch(model).fused == ["blocks.0"]


def test_apex_norms_are_known() -> None:
    """OpenGVLab's code takes apex's FusedRMSNorm for every RMSNorm where apex is installed; its eps is called eps."""

    class FusedRMSNorm(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight, self.eps = norm.weight, norm.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)

    model, pixels = upstream("opengvlab-rms_norm")
    expected = features(model, pixels)
    for layer in model.encoder.layers:
        layer.norm1, layer.norm2 = FusedRMSNorm(layer.norm1), FusedRMSNorm(layer.norm2)
        layer.attn.q_norm, layer.attn.k_norm = FusedRMSNorm(layer.attn.q_norm), FusedRMSNorm(layer.attn.k_norm)
    assert len(internvit.patch(model).fused) == 3
    assert relative_error(features(model, pixels), expected) <= 1e-5


def test_a_forward_replaced_on_the_instance_is_kept() -> None:
    model, pixels = upstream("opengvlab-rms_norm")
    layer = model.encoder.layers[0]
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    expected = features(model, pixels)
    handle = internvit.patch(model)
    assert handle.left == {"encoder.layers.0": "its forward was replaced on the instance"}
    assert relative_error(features(model, pixels), expected) <= 1e-5
    # Someone wraps a fused block, and the patch is undone under it.
    layer = model.encoder.layers[1]
    inner = layer.forward
    layer.forward = lambda x: inner(x)
    handle.undo()
    assert torch.equal(features(model, pixels), expected)
