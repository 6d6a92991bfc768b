"""The backbone's maps and pyramid against a restatement of upstream's formulas; freezing, checkpointing, loading."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import internvit.numerics
from internvit import InternViT, InternViTBackbone, InternViTConfig, convert_state_dict, reference
from internvit.checkpoint import hub
from internvit.dense.pyramid import FeaturePyramid
from internvit.model import encoder
from internvit.model.block import InternViTLayer
from tests.support.models import random_weights

SMALL = {"image_size": 56, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def config(layers: int, norm_type: str = "layer_norm", **changes) -> InternViTConfig:
    qk_norm = norm_type == "rms_norm"
    more = {"norm_type": norm_type, "qkv_bias": not qk_norm, "qk_normalization": qk_norm}
    return InternViTConfig(**{**SMALL, **more, "num_hidden_layers": layers, **changes})


def made(config: InternViTConfig, **settings) -> InternViTBackbone:
    backbone = InternViTBackbone(config, **settings)
    random_weights(backbone)
    return backbone


def restated_maps(backbone: InternViTBackbone, pixels: Tensor) -> list[Tensor]:
    """Upstream's loop over blocks on the reference in float64, with no use of the backbone's code."""
    tower = {k: v.double() for k, v in backbone.state_dict().items() if not k.startswith("up")}
    layers = 1 + max(int(k.split(".")[2]) for k in tower if k.startswith("encoder"))
    plain = reference.InternViT(backbone.config.replace(num_hidden_layers=layers, drop_path_rate=0.0, name=None))
    plain.double().load_state_dict(tower)
    x = plain.embeddings(pixels.double())
    grid = [side // backbone.config.patch_size for side in pixels.shape[2:]]
    maps = []
    for i, layer in enumerate(plain.encoder.layers):
        x = layer(x)[0]
        if i in backbone.out_indices:
            maps.append(x[:, 1:].transpose(1, 2).reshape(len(x), -1, *grid))
    return maps


def restated_pyramid(weights: dict[str, Tensor], maps: list[Tensor], final_norm: bool) -> list[Tensor]:
    """The four levels as sums over pixels of a 2 x 2 grid, without nn.ConvTranspose2d."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        scale, shift = (weights[f"{name}.{p}"].double()[:, None, None] for p in ("weight", "bias"))
        return (x - mean) / (var + 1e-6).sqrt() * scale + shift

    def up(x: Tensor, name: str) -> Tensor:
        b, _, h, w = x.shape
        kernel, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
        y = torch.einsum("bchw,cdij->bdhiwj", x, kernel)  # each pixel becomes a 2 x 2 patch
        return y.reshape(b, -1, 2 * h, 2 * w) + bias[:, None, None]

    first = up(F.gelu(norm(up(maps[0], "up1.0"), "up1.1")), "up1.3")
    h, w = (side // 2 * 2 for side in maps[3].shape[2:])
    last = maps[3][:, :, :h, :w].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    levels = [first, up(maps[1], "up2.0"), maps[2], last]
    ends = ("up1.4", "up2.1", "up3.1", "up4.1")
    return [norm(x, end) if final_norm else x for x, end in zip(levels, ends, strict=True)]


def close(actual: Tensor, truth: Tensor, bound: float = 1e-5) -> None:
    assert actual.shape == truth.shape
    assert (actual.double() - truth).norm() <= bound * truth.norm()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("size", [(224, 224), (336, 504), (504, 504)])
@pytest.mark.parametrize(
    ("layers", "indices", "norm_type"), [(24, (7, 11, 15, 23), "layer_norm"), (48, (11, 23, 35, 47), "rms_norm")]
)
@torch.no_grad()
def test_maps_and_pyramid_are_upstreams(size, layers, indices, norm_type) -> None:
    backbone = made(config(layers, norm_type), out_indices=indices, fpn=True, final_norm=layers == 48).eval()
    pixels = torch.randn(1, 3, *size)
    truth = restated_maps(backbone, pixels)
    pyramid = backbone(pixels)
    backbone.fpn = False
    for actual, expected in zip(backbone(pixels), truth, strict=True):
        close(actual, expected)
    for actual, expected in zip(pyramid, restated_pyramid(backbone.state_dict(), truth, layers == 48), strict=True):
        close(actual, expected)


@torch.no_grad()
def test_maps_are_the_models_hidden_states_to_the_bit() -> None:
    model = InternViT(config(4)).eval()
    random_weights(model)
    backbone = InternViTBackbone.from_model(model, out_indices=(1, -1))
    pixels = torch.randn(2, 3, 56, 84)
    hidden = model(pixels, output_hidden_states=True).hidden_states
    for x, i in zip(backbone(pixels), (2, 4), strict=True):
        assert torch.equal(x, hidden[i][:, 1:].transpose(1, 2).unflatten(2, (4, 6)))


def test_blocks_past_the_last_index_are_not_there() -> None:
    backbone = InternViTBackbone(config(6, drop_path_rate=0.5), out_indices=(0, 2))
    assert len(backbone.encoder.layers) == 3
    rates = [layer.drop_path_rate for layer in backbone.encoder.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])  # of the whole depth
    assert backbone.channels == (32, 32)
    assert backbone.strides == (14.0, 14.0)


def test_frozen_keeps_no_graph_and_the_pyramid_learns() -> None:
    backbone = made(config(4, drop_path_rate=0.5), out_indices=(0, 1, 2, 3), fpn=True, freeze=True)
    backbone.train()
    pixels = torch.randn(2, 3, 56, 56, requires_grad=True)
    first, second = backbone(pixels), backbone(pixels)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # no drop path in a frozen tower
    sum(x.square().mean() for x in first).backward()
    assert pixels.grad is None
    assert {name.split(".")[0] for name, p in backbone.named_parameters() if p.grad is not None} == {"up1", "up2"}
    plain = made(config(4), out_indices=(0, 3), freeze=True)
    assert not any(x.requires_grad for x in plain(pixels))


def test_checkpointing_has_the_same_gradients_and_is_off_in_eval(monkeypatch) -> None:
    backbone = made(config(3), out_indices=(0, 2), gradient_checkpointing="block")
    pixels = torch.randn(1, 3, 56, 56)
    calls = []
    right = encoder.checkpoint
    monkeypatch.setattr(encoder, "checkpoint", lambda *a, **k: calls.append(1) or right(*a, **k))

    def grads() -> tuple[Tensor, ...]:
        used = [p for p in backbone.parameters() if p.requires_grad]
        return torch.autograd.grad(sum(x.square().mean() for x in backbone(pixels)), used)

    backbone.train()
    checkpointed = grads()
    assert len(calls) == 3
    backbone.encoder.gradient_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, grads(), strict=True))
    backbone.encoder.gradient_checkpointing = True
    backbone.eval()
    grads()
    assert len(calls) == 3


@pytest.mark.parametrize("wrapper", ["module", "state_dict"])
@torch.no_grad()
def test_mmseg_checkpoints_load_with_their_pyramid(tmp_path, wrapper) -> None:
    cfg = config(4, "rms_norm")
    source = made(cfg, out_indices=(0, 1, 2, 3), fpn=True).eval()
    weights = source.state_dict()
    tower = {k: v for k, v in weights.items() if not k.startswith("up")}
    keys = {**convert_state_dict(tower, to="mmseg"), **{k: v for k, v in weights.items() if k.startswith("up")}}
    prefix = "backbone." if wrapper == "state_dict" else ""
    torch.save({wrapper: {f"{prefix}{k}": v for k, v in keys.items()}}, tmp_path / "model.pth")
    loaded = InternViTBackbone.from_pretrained(tmp_path / "model.pth", (0, 1, 2, 3), fpn=True, config=cfg)
    pixels = torch.randn(1, 3, 56, 84)
    for a, b in zip(loaded(pixels), source(pixels), strict=True):
        assert torch.equal(a, b)
    del keys["up2.0.bias"]
    torch.save({wrapper: {f"{prefix}{k}": v for k, v in keys.items()}}, tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=r"up2\.0\.bias"):
        InternViTBackbone.from_pretrained(tmp_path / "broken.pth", (0, 1, 2, 3), fpn=True, config=cfg)


def test_a_hub_checkpoint_is_located_once_with_its_revision_and_token(tmp_path, monkeypatch) -> None:
    InternViT(config(4)).save_pretrained(tmp_path)
    asked: list[tuple] = []
    monkeypatch.setattr(hub, "locate", lambda *args, **settings: asked.append((*args, settings)) or tmp_path)
    InternViTBackbone.from_pretrained("some/model", (0, 1, 2, 3), fpn=True, revision="abc", token="secret")
    assert asked == [("some/model", {"revision": "abc", "token": "secret", "prefix": None})]


def test_a_backbone_is_built_once(monkeypatch) -> None:
    built, init = [], InternViTLayer.__init__
    monkeypatch.setattr(InternViTLayer, "__init__", lambda *args, **kw: built.append(1) or init(*args, **kw))
    InternViTBackbone(config(6), out_indices=(0, 2))
    assert len(built) == 3


def test_a_pyramid_that_is_not_there_is_logged(tmp_path, caplog) -> None:
    InternViT(config(4)).save_pretrained(tmp_path)
    backbone = InternViTBackbone.from_pretrained(tmp_path, (0, 1, 2, 3), fpn=True, freeze=True)
    assert "no feature pyramid there" in caplog.text
    assert backbone.up1[0].weight.std().item() == pytest.approx((2 / (4 * 32)) ** 0.5, rel=0.1)
    assert not any(p.requires_grad for p in backbone.encoder.parameters())


@torch.no_grad()
def test_bfloat16_maps_and_output_dtype() -> None:
    backbone = made(config(4, "rms_norm"), out_indices=(0, 1, 2, 3), fpn=True, out_dtype=torch.float32).bfloat16()
    maps = backbone.eval()(torch.randn(1, 3, 56, 56))
    assert [x.dtype for x in maps] == [torch.float32] * 4
    assert [tuple(x.shape) for x in maps] == [(1, 32, 16, 16), (1, 32, 8, 8), (1, 32, 4, 4), (1, 32, 2, 2)]
    wide = backbone.float()
    wide_maps = wide(torch.randn(1, 3, 56, 56))
    assert all(x.isfinite().all() for x in (*maps, *wide_maps))


@pytest.mark.sampled(2)
@torch.no_grad()
def test_compiles_whole() -> None:
    backbone = made(config(3), out_indices=(0, 2)).eval()
    pixels = torch.randn(1, 3, 56, 56)
    torch.compiler.reset()
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(pixels), backbone(pixels), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out_indices": (7, 11)}, "out_indices: expected ascending numbers of blocks between 0 and 3"),
        ({"out_indices": (2, 1)}, "ascending"),
        ({"out_indices": ()}, "out_indices"),
        ({"out_indices": (1, 2), "fpn": True}, "fpn: the pyramid takes four maps"),
        ({"out_indices": (1,), "final_norm": True}, "final_norm"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        InternViTBackbone(config(4), **settings)


def test_bad_pixels_and_maps() -> None:
    backbone = InternViTBackbone(config(4), out_indices=(3,))
    with pytest.raises(ValueError, match="multiples of patch_size=14, got 57x56"):
        backbone(torch.randn(1, 3, 57, 56))
    with pytest.raises(ValueError, match="takes four, got 1"):
        FeaturePyramid(8)([torch.randn(1, 8, 2, 2)])


def test_channels_first_norm_is_in_float32_under_half_precision() -> None:
    from internvit.dense.pyramid import ChannelsFirstLayerNorm

    norm = ChannelsFirstLayerNorm(32, eps=1e-6)
    nn.init.normal_(norm.weight)
    x = (torch.randn(2, 32, 3, 5) + 30).bfloat16()
    truth = F.layer_norm(x.double().movedim(1, -1), (32,), norm.weight.double(), norm.bias.double(), 1e-6).movedim(
        -1, 1
    )
    assert internvit.numerics.relative_error(norm(x), truth) < 4e-3
