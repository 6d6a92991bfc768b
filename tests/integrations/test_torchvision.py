"""The simple feature pyramid against a restatement, and inside torchvision's detectors."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import InternViTBackbone, InternViTConfig
from internvit.integrations.torchvision import DetectionBackbone, SimpleFeaturePyramid
from tests.support.models import random_weights

CONFIG = InternViTConfig(
    image_size=64, patch_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)


def tower(**changes) -> InternViTBackbone:
    backbone = InternViTBackbone(CONFIG.replace(**changes), out_indices=(-1,))
    random_weights(backbone)
    return backbone


def restated(weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """Upsampling as sums over a 2 x 2 grid, convolutions as sums over shifted maps; float64."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        scale, shift = (weights[f"{name}.{p}"].double()[:, None, None] for p in ("weight", "bias"))
        return (x - mean) / (var + 1e-6).sqrt() * scale + shift

    def up(x: Tensor, name: str) -> Tensor:
        kernel, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
        y = torch.einsum("bchw,cdij->bdhiwj", x, kernel)
        return y.reshape(len(x), kernel.shape[1], 2 * x.shape[2], 2 * x.shape[3]) + bias[:, None, None]

    def ends(x: Tensor, level: int, first: int) -> Tensor:
        name = f"levels.{level}."
        x = norm(
            torch.einsum("bchw,dc->bdhw", x, weights[f"{name}{first}.weight"][:, :, 0, 0].double()),
            f"{name}{first + 1}",
        )
        kernel, wide = weights[f"{name}{first + 2}.weight"].double(), F.pad(x, (1, 1, 1, 1))
        h, w = x.shape[2:]
        shifted = [(kernel[:, :, i, j], wide[:, :, i : i + h, j : j + w]) for i in range(3) for j in range(3)]
        return norm(sum(torch.einsum("dc,bchw->bdhw", k, y) for k, y in shifted), f"{name}{first + 3}")

    large = up(F.gelu(norm(up(x, "levels.0.0"), "levels.0.1")), "levels.0.3")
    h, w = (side // 2 * 2 for side in x.shape[2:])
    small = x[:, :, :h, :w].unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))
    return [ends(large, 0, 4), ends(up(x, "levels.1.0"), 1, 1), ends(x, 2, 0), ends(small, 3, 1)]


@torch.no_grad()
def test_pyramid_is_vitdets() -> None:
    pyramid = SimpleFeaturePyramid(32, 12)
    for p in pyramid.parameters():
        p.copy_(torch.randn_like(p) * 0.3)
    x = torch.randn(2, 32, 5, 6)
    for actual, truth in zip(pyramid(x), restated(pyramid.state_dict(), x.double()), strict=True):
        assert actual.shape == truth.shape
        assert (actual.double() - truth).norm() <= 1e-5 * truth.norm()


def test_mask_rcnn_trains_and_detects() -> None:
    detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
    torch.use_deterministic_algorithms(False)  # RoIAlign's backward has no deterministic form
    backbone = DetectionBackbone(tower(), out_channels=16)
    sizes = tuple((s,) for s in (8, 16, 32, 64, 128))
    anchors = detection.anchor_utils.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    model = detection.MaskRCNN(
        backbone, num_classes=3, rpn_anchor_generator=anchors, min_size=64, max_size=128, box_detections_per_img=5
    )
    images = [torch.rand(3, 60, 90), torch.rand(3, 80, 64)]
    masks = torch.zeros(1, 60, 90, dtype=torch.uint8)
    masks[:, 10:40, 20:60] = 1
    target = {"boxes": torch.tensor([[20.0, 10.0, 60.0, 40.0]]), "labels": torch.tensor([1]), "masks": masks}
    other = {**target, "masks": torch.zeros(1, 80, 64, dtype=torch.uint8)}
    losses = model.train()(images, [target, other])
    assert losses.keys() == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    assert not [n for n, p in backbone.named_parameters() if p.grad is None]
    with torch.no_grad():
        detections = model.eval()(images)
    assert [x["boxes"].shape[1] for x in detections] == [4, 4]
    assert detections[0]["masks"].shape[1:] == (1, 60, 90)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["MaskRCNN", "FasterRCNN", "KeypointRCNN", "RetinaNet", "FCOS"])
def test_detectors_take_the_backbone_with_their_default_anchors(name) -> None:
    detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
    few = {"box_detections_per_img": 5} if name.endswith("RCNN") else {}  # of 100 the heads take half a minute
    model = getattr(detection, name)(DetectionBackbone(tower(), 256), num_classes=3, min_size=64, max_size=128, **few)
    model.eval()
    with torch.no_grad():
        detections = model([torch.rand(3, 60, 90), torch.rand(3, 80, 64)])
    assert [x["boxes"].shape[1] for x in detections] == [4, 4]


@pytest.mark.parametrize("size", [(16, 64), (64, 16), (16, 16), (48, 16)])
def test_a_side_of_one_patch(size) -> None:
    maps = DetectionBackbone(tower(), 8)(torch.randn(1, 3, *size))
    rows, columns = size[0] // 16, size[1] // 16
    assert maps["3"].shape[2:] == (max(rows // 2, 1), max(columns // 2, 1))
    assert maps["pool"].isfinite().all()


def test_strides_are_what_torchvision_reads() -> None:
    maps = DetectionBackbone(tower(), 8, pool=False)(torch.randn(1, 3, 96, 64))
    assert [(96 / x.shape[2], 64 / x.shape[3]) for x in maps.values()] == [(4, 4), (8, 8), (16, 16), (32, 32)]
    assert list(maps) == ["0", "1", "2", "3"]


def test_a_checkpoint_of_patch_14_is_taken_to_16(tmp_path) -> None:
    from internvit import InternViT

    InternViT(CONFIG.replace(patch_size=14, image_size=56)).save_pretrained(tmp_path)
    loaded = InternViTBackbone.from_pretrained(tmp_path, (-1,), patch_size=16, image_size=64)
    assert DetectionBackbone(loaded, 8)(torch.randn(1, 3, 64, 64))["2"].shape == (1, 8, 4, 4)


def test_bad_backbones() -> None:
    with pytest.raises(ValueError, match=r"power of two, got 14; load it with from_pretrained\(..., patch_size=16\)"):
        DetectionBackbone(tower(patch_size=14, image_size=56))
    with pytest.raises(ValueError, match="expected fpn=False"):
        DetectionBackbone(InternViTBackbone(CONFIG.replace(num_hidden_layers=4), (0, 1, 2, 3), fpn=True))
    with pytest.raises(ValueError, match="channels: expected a multiple of 4, got 30"):
        SimpleFeaturePyramid(30)
