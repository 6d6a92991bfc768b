"""Layer-wise learning-rate decay against upstream's rule, restated here from its constructor."""

import pytest
import torch
from torch import nn

import internvit
from internvit import InternViT, InternViTConfig
from internvit.optim import param_groups_layer_decay
from tests.support.models import CONFIGS, mmseg_judge, timm_judge, transformers_judge

CONFIG = InternViTConfig(
    image_size=56, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, intermediate_size=192
)


def upstream_rule(name: str, parameter: nn.Parameter, num_layers: int, weight_decay: float, rate: float) -> tuple:
    """(lr scale, weight decay) by OpenGVLab's constructor, for names that begin with `backbone.`."""
    ids = num_layers + 2
    tokens = ("backbone.cls_token", "backbone.mask_token", "backbone.pos_embed", "backbone.visual_embed")
    if name in tokens or name.startswith("backbone.patch_embed"):
        layer = 0
    elif name.startswith(("backbone.blocks", "backbone.layers")):
        layer = int(name.split(".")[2]) + 1
    else:
        layer = ids - 1
    no_decay = len(parameter.shape) == 1 or name.endswith(".bias") or name in ("pos_embed", "cls_token")
    return rate ** (ids - layer - 1), 0.0 if no_decay else weight_decay


class Segmenter(nn.Module):
    """A backbone and a head whose names look like blocks."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = nn.Module()
        self.decode_head.layers = nn.ModuleList([nn.Conv2d(96, 8, 1), nn.BatchNorm2d(8)])
        self.decode_head.blocks = nn.ModuleList([nn.Conv2d(8, 2, 1)])
        self.decode_head.pos_embed = nn.Parameter(torch.zeros(1, 4, 96))


def settings(groups: list[dict]) -> dict[str, tuple]:
    return {n: (g["lr_scale"], g["weight_decay"]) for g in groups for n in g["param_names"]}


def test_is_upstreams_rule_with_its_quirk() -> None:
    model = Segmenter(mmseg_judge(CONFIG, InternViT(CONFIG).state_dict()))
    ours = settings(param_groups_layer_decay(model, 0.05, 0.95, upstream_weight_decay_quirk=True))
    expected = {n: upstream_rule(n, p, 3, 0.05, 0.95) for n, p in model.named_parameters()}
    assert ours == {n: pytest.approx(value) for n, value in expected.items()}
    assert ours["backbone.pos_embed"] == (pytest.approx(0.95**4), 0.05), "upstream's quirk"
    intended = settings(param_groups_layer_decay(model, 0.05, 0.95))
    changed = {n for n in ours if ours[n] != intended[n]}
    assert changed == {"backbone.pos_embed", "backbone.cls_token"}
    assert all(intended[n] == (pytest.approx(0.95**4), 0.0) for n in changed)


@pytest.mark.parametrize("spelling", ["opengvlab", "transformers", "timm"])
def test_every_upstreams_names_give_the_same_groups(spelling) -> None:
    config = CONFIGS["tiny-layer_norm"]
    model = InternViT(config)
    if spelling == "transformers":
        other = transformers_judge(config, model.state_dict())
    elif spelling == "timm":
        other = timm_judge(config, model.state_dict())
    else:
        other = nn.ModuleDict({"vision_model": model})

    def sizes(m: nn.Module) -> dict[tuple, int]:
        return {
            (g["name"], g["lr_scale"], g["weight_decay"]): sum(p.numel() for p in g["params"])
            for g in param_groups_layer_decay(m, 0.1, 0.5)
        }

    assert sizes(other) == sizes(model)
    assert {name for name, _, _ in sizes(model)} == {
        f"layer_{i}_{kind}" for i in range(4) for kind in ("decay", "no_decay")
    }


def test_the_published_depths_and_scales() -> None:
    model = InternViT(InternViTConfig.from_name("internvit-6b-448px-v2.5"), device="meta")
    scales = {n: scale for n, (scale, _) in settings(param_groups_layer_decay(model, 0.05, 0.95)).items()}
    assert scales["embeddings.patch_embedding.weight"] == pytest.approx(0.95**46)
    assert scales["encoder.layers.0.ls1"] == pytest.approx(0.95**45)
    assert scales["encoder.layers.44.mlp.fc2.weight"] == pytest.approx(0.95)


def test_trains_with_a_schedule_and_leaves_the_frozen_out() -> None:
    model = Segmenter(InternViT(CONFIG))
    model.backbone.encoder.layers[0].requires_grad_(False)
    groups = param_groups_layer_decay(model, 0.05, 0.5, lr=1e-2)
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    by_name = {g["name"]: g for g in optimizer.param_groups}
    assert by_name["layer_4_decay"]["lr"] == pytest.approx(1e-2 / 2)
    assert by_name["layer_3_decay"]["lr"] == pytest.approx(1e-2 / 4)
    assert not any(name.startswith("layer_1") for name in by_name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight_decay=-1), "weight_decay must be a number >= 0, got -1"),
        (dict(layer_decay=0), r"layer_decay must be in \(0, 1\], got 0"),
        (dict(layer_decay=1.5), r"layer_decay must be in \(0, 1\], got 1.5"),
        (dict(lr=float("nan")), "lr must be a number >= 0 or None, got nan"),
        (dict(model=3), "model must be a torch.nn.Module, got 'int'"),
        (dict(model=nn.Linear(2, 2)), "model must hold exactly one InternViT, got none"),
    ],
)
def test_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups_layer_decay(**{"model": nn.Linear(2, 2), **arguments})


def test_two_towers_are_refused_by_name() -> None:
    two = nn.ModuleDict({name: InternViT(CONFIG.replace(num_hidden_layers=1)) for name in ("student", "teacher")})
    with pytest.raises(ValueError, match=r"got student\., teacher\."):
        internvit.optim.param_groups_layer_decay(two)
