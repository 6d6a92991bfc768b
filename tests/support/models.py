"""Independent implementations with the weights of ours, and the configurations they are compared on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from internvit import InternViT, InternViTConfig, reference
from internvit.checkpoint.state_dict import convert_state_dict
from internvit.upstream.patch import FusedBlock

_TINY: dict[str, Any] = {
    "image_size": 56,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 192,
}
_LAYER_NORM: dict[str, Any] = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}

CONFIGS: dict[str, InternViTConfig] = {
    "tiny-layer_norm": InternViTConfig(**_TINY, **_LAYER_NORM),
    "tiny-rms_norm": InternViTConfig(**_TINY),
    "300m-2-layers": InternViTConfig.from_name("internvit-300m-448px", num_hidden_layers=2, drop_path_rate=0.0),
    "6b-2-layers": InternViTConfig.from_name("internvit-6b-448px-v2.5", num_hidden_layers=2),
}


def images(config: InternViTConfig, batch: int) -> Tensor:
    return torch.randn(batch, 3, *config.image_hw)


@torch.no_grad()
def random_weights(model: nn.Module) -> None:
    """Weights at which every part matters: LayerScale near 0.3, norms near 1, unit-variance Linears, no zero bias."""
    for name, p in model.named_parameters():
        if name.endswith(("ls1", "ls2")):
            p.copy_(0.3 + 0.1 * torch.randn_like(p))
        elif "norm" in name and name.endswith("weight"):
            p.copy_(1 + 0.3 * torch.randn_like(p))
        elif p.dim() > 1 and "embedding" not in name:
            p.normal_(std=p.shape[1] ** -0.5)
        elif "patch_embedding.weight" in name:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.copy_(0.5 * torch.randn_like(p))


def transformers_judge(config: InternViTConfig, state_dict: dict[str, Tensor], **changes: Any) -> nn.Module:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    judge = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            attention_bias=config.qkv_bias,
            use_qk_norm=config.qk_normalization,
            norm_type=config.norm_type,
            layer_norm_eps=config.layer_norm_eps,
            image_size=list(config.image_hw),
            patch_size=[config.patch_size] * 2,
            **changes,
        )
    ).eval()
    judge.load_state_dict(convert_state_dict(state_dict, to="transformers"), strict=True)
    return judge


def timm_judge(config: InternViTConfig, state_dict: dict[str, Tensor], **changes: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    judge = VisionTransformer(
        img_size=config.image_hw,
        patch_size=config.patch_size,
        num_classes=0,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
        init_values=0.1,
        final_norm=False,
        **changes,
    ).eval()
    judge.load_state_dict(convert_state_dict(state_dict, to="timm"), strict=True)
    return judge


def opengvlab_judge(config: InternViTConfig, state_dict: dict[str, Tensor]) -> nn.Module:
    from tests.support.upstream.opengvlab import InternVisionModel

    judge = InternVisionModel(config).eval()
    judge.load_state_dict(state_dict, strict=True)
    return judge


def mmseg_judge(config: InternViTConfig, state_dict: dict[str, Tensor], **changes: Any) -> nn.Module:
    from tests.support.upstream.mmseg import InternViT6B

    judge = InternViT6B(
        img_size=config.image_hw[0],
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        qkv_bias=config.qkv_bias,
        drop_path_rate=config.drop_path_rate,
        out_indices=(config.num_hidden_layers - 1,),
        **changes,
    ).eval()
    judge.load_state_dict(convert_state_dict(state_dict, to="mmseg"), strict=True)
    return judge


def features(judge: nn.Module, pixels: Tensor) -> Tensor:
    """The last block's tokens (mmseg: as a map, without the class token) of any judge."""
    if hasattr(judge, "forward_features"):
        return judge.forward_features(pixels)
    out = judge(pixels)
    return out[-1] if isinstance(out, list) else out.last_hidden_state


@contextlib.contextmanager
def counted() -> Iterator[list[nn.Module]]:
    """The blocks of patched models that run fused, in order."""
    ran: list[nn.Module] = []
    run = FusedBlock.run
    try:
        FusedBlock.run = lambda self, x: ran.append(self.block) or run(self, x)
        yield ran
    finally:
        FusedBlock.run = run


def replicate(model: nn.Module, change: float) -> nn.Module:
    """As torch.nn.parallel.replicate does, without a GPU; the parameters are `change` times those here."""
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    replicas = [module._replicate_for_data_parallel() for module in modules]
    for module, replica in zip(modules, replicas, strict=True):
        for key, child in module._modules.items():
            setattr(replica, key, None if child is None else replicas[index[child]])
        for key, parameter in module._parameters.items():
            setattr(replica, key, None if parameter is None else parameter * change)
    return replicas[0]


def pair(name: str, **changes: Any) -> tuple[InternViT, reference.InternViT]:
    """The model and the reference in eval mode, of one configuration and the same random weights."""
    config = CONFIGS[name].replace(**changes)
    # Made on the meta device: drawing weights that are replaced takes longer than a forward.
    with torch.device("meta"):
        plain = reference.InternViT(config)
    plain = plain.to_empty(device="cpu").eval()
    random_weights(plain)
    model = InternViT(config, device="meta").to_empty(device="cpu").eval()
    model.load_state_dict(plain.state_dict())
    return model, plain
