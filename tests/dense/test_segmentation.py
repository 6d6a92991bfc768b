"""Heads, sliding windows, flip test and mIoU against restatements written here."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from internvit import InternViTBackbone, InternViTConfig
from internvit.dense.segmentation import (
    IGNORE,
    LinearHead,
    Segmenter,
    UPerNetHead,
    predict,
    segmentation_loss,
    slide_inference,
)
from tests.support.models import random_weights

CONFIG = InternViTConfig(
    image_size=56, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64
)


def backbone(**settings) -> InternViTBackbone:
    made = InternViTBackbone(CONFIG, out_indices=(0, 1, 2, 3), **settings)
    random_weights(made)
    return made


def test_linear_head_is_norm_and_1x1() -> None:
    head = LinearHead(8, 3)
    torch.nn.init.normal_(head.norm.weight)
    torch.nn.init.normal_(head.classifier.bias)
    x = torch.randn(2, 8, 4, 5)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), correction=0)
    normed = (x.double() - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * head.norm.weight[:, None, None]
    expected = torch.einsum("bchw,kc->bkhw", normed, head.classifier.weight[:, :, 0, 0].double())
    expected = expected + head.classifier.bias.double()[:, None, None]
    torch.testing.assert_close(head([torch.full_like(x, torch.nan), x]).double(), expected, rtol=1e-4, atol=1e-5)
    assert head([x.bfloat16()]).dtype == torch.float32
    assert isinstance(LinearHead(8, 3, norm=False).norm, torch.nn.Identity)


def upernet(**settings) -> UPerNetHead:
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    torch.use_deterministic_algorithms(False)  # adaptive pooling's backward has no deterministic form
    return UPerNetHead((32,) * 4, 3, hidden_size=16, pool_scales=(1, 2), **settings)


@pytest.mark.parametrize("kind", ["linear", "upernet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segmenter_trains(kind, dtype) -> None:
    tower = backbone(fpn=kind == "upernet", freeze=True)
    tower.embeddings.to(dtype)
    tower.encoder.to(dtype)
    if dtype != torch.float32 and kind == "upernet":
        tower.to(dtype)
    head = LinearHead(32, 3) if kind == "linear" else upernet()
    model = Segmenter(tower, head).train()
    pixels, labels = torch.randn(2, 3, 56, 84), torch.randint(0, 3, (2, 56, 84))
    assert model(pixels).shape == (2, 3, 56, 84)
    assert model(pixels).dtype == torch.float32
    model.loss(pixels, labels).backward()
    assert {n.split(".")[0] for n, p in head.named_parameters() if p.grad is None} == set()
    assert all(p.grad is None for p in tower.encoder.parameters())


def test_loss_is_cross_entropy_of_resized_logits_with_the_auxiliary() -> None:
    head = upernet(auxiliary_weight=0.3, dropout=0.0).eval()
    maps = [torch.randn(2, 32, s, s) for s in (8, 4, 4, 2)]
    labels = torch.randint(0, 3, (2, 16, 16))
    labels[:, :5] = IGNORE

    def cross_entropy(logits: Tensor) -> Tensor:
        x = F.interpolate(logits, (16, 16), mode="bilinear").double().movedim(1, -1)
        kept = labels != IGNORE
        return (x.logsumexp(-1)[kept] - x[kept].gather(-1, labels[kept][:, None])[:, 0]).mean()

    expected = cross_entropy(head(maps)) + 0.3 * cross_entropy(head.auxiliary(maps))
    torch.testing.assert_close(segmentation_loss(head, maps, labels).double(), expected, rtol=1e-5, atol=1e-6)
    assert segmentation_loss(head, maps, torch.full_like(labels, IGNORE)) == 0
    assert upernet(auxiliary_weight=0).auxiliary is None


@pytest.mark.parametrize(
    ("channels", "settings", "message"),
    [
        ((64,), {}, "auxiliary_index: expected -1 to 0, as channels has 1, or auxiliary_weight=0, got 2"),
        ((64,) * 4, {"auxiliary_index": -5}, r"auxiliary_index: expected -4 to 3, .* got -5"),
        ((), {"auxiliary_weight": 0}, "channels: expected a number for each map, got none"),
    ],
)
def test_upernet_names_maps_that_are_not_there(channels, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        UPerNetHead(channels, 5, **settings)


def test_upernet_of_one_map_without_the_auxiliary() -> None:
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    head = UPerNetHead((8,), 5, hidden_size=16, auxiliary_weight=0).eval()
    assert head([torch.randn(1, 8, 6, 6)]).shape == (1, 5, 6, 6)


def mmsegs_loop(network, img: Tensor, crop: tuple[int, int], stride: tuple[int, int]) -> Tensor:
    """mmseg's slide_inference, restated after its loop over grid indices."""
    h_stride, w_stride = stride
    h_crop, w_crop = crop
    batch, _, h_img, w_img = img.shape
    h_grids = max(h_img - h_crop + h_stride - 1, 0) // h_stride + 1
    w_grids = max(w_img - w_crop + w_stride - 1, 0) // w_stride + 1
    preds, count = 0, torch.zeros(batch, 1, h_img, w_img)
    for h_idx in range(h_grids):
        for w_idx in range(w_grids):
            y1, x1 = h_idx * h_stride, w_idx * w_stride
            y2, x2 = min(y1 + h_crop, h_img), min(x1 + w_crop, w_img)
            y1, x1 = max(y2 - h_crop, 0), max(x2 - w_crop, 0)
            logits = network(img[:, :, y1:y2, x1:x2])
            preds = preds + F.pad(logits, (x1, w_img - x2, y1, h_img - y2))
            count[:, :, y1:y2, x1:x2] += 1
    return preds / count


def network(x: Tensor) -> Tensor:
    """Logits that depend on where a pixel lies in its window."""
    ramp = torch.arange(x.shape[-1]) + 10 * torch.arange(x.shape[-2])[:, None]
    return torch.stack([x.mean(1) * ramp, x.amax((1, 2, 3))[:, None, None] + ramp], 1)


@pytest.mark.parametrize("size", [(28, 28), (42, 70), (57, 31), (30, 28), (29, 100)])
@pytest.mark.parametrize("batch", [1, 5])
def test_sliding_windows_are_mmsegs(size, batch) -> None:
    pixels = torch.randn(2, 3, *size)
    ours = slide_inference(network, pixels, (28, 28), (18, 18), batch=batch)
    torch.testing.assert_close(ours, mmsegs_loop(network, pixels, (28, 28), (18, 18)))


def test_upstreams_windows_cover_an_ade20k_image() -> None:
    seen = []
    x = torch.randn(1, 3, 512, 683)
    slide_inference(lambda w: seen.append(tuple(w.shape)) or w[:, :2], x)
    assert seen == [(1, 3, 504, 504)] * 4
    out = slide_inference(lambda w: w, x)
    torch.testing.assert_close(out, x)  # every pixel comes back, once


def test_a_short_side_is_padded_to_the_patch_and_cut() -> None:
    seen = []
    out = slide_inference(lambda w: seen.append(w) or w, torch.ones(1, 3, 20, 60), (28, 28), (18, 18))
    assert out.shape == (1, 3, 20, 60)
    assert all(w.shape == (1, 3, 28, 28) for w in seen)
    assert all((w[:, :, 20:] == 0).all() for w in seen)


def test_flip_test_is_the_mean_of_both() -> None:
    pixels = torch.randn(1, 3, 28, 28)
    mirrored = network(pixels.flip(-1)).softmax(1).flip(-1)
    expected = (network(pixels).softmax(1) + mirrored) / 2
    torch.testing.assert_close(predict(network, pixels, flip=True), expected)
    torch.testing.assert_close(predict(network, pixels).sum(1), torch.ones(1, 28, 28))


def test_sliding_with_a_real_model() -> None:
    model = Segmenter(backbone(), LinearHead(32, 3)).eval()
    with torch.no_grad():
        out = slide_inference(model, torch.randn(1, 3, 61, 75), (56, 56), (28, 28))
    assert out.shape == (1, 3, 61, 75)
    assert out.isfinite().all()


@pytest.mark.parametrize("size", [(10, 300), (300, 14), (14, 14), (1, 1), (57, 15)])
@pytest.mark.parametrize("kind", ["linear", "upernet"])
def test_a_side_of_one_patch_with_a_pyramid(size, kind) -> None:
    head = LinearHead(32, 3) if kind == "linear" else upernet()
    model = Segmenter(backbone(fpn=True), head).eval()
    pixels = torch.randn(1, 3, *size)
    with torch.no_grad():
        out = slide_inference(model, pixels, (56, 56), (28, 28))
    assert out.shape == (1, 3, *size)
    assert out.isfinite().all()


def test_evaluating_an_image_of_one_patch_with_a_pyramid(tmp_path) -> None:
    pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
    from internvit.dense.segmentation import Pair
    from internvit.dense.segmentation.evaluation import Testing, evaluate

    pairs = []
    for i, (height, width) in enumerate([(10, 300), (30, 5), (3, 3)]):
        pairs.append(Pair(tmp_path / f"{i}.png", tmp_path / f"{i}-mask.png"))
        Image.fromarray(np.random.randint(0, 256, (height, width, 3), np.uint8)).save(pairs[-1].image)
        Image.fromarray(np.random.randint(0, 3, (height, width), np.uint8)).save(pairs[-1].mask)
    model = Segmenter(backbone(fpn=True), upernet()).eval()
    for settings in ({"short_side": 0}, {"short_side": 14, "long_side": 100}, {"short_side": 0, "flip": True}):
        scores = evaluate(model, pairs, 3, Testing(crop=56, stride=28, **settings), 14)
        assert 0 <= scores.miou <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": (30, 28)}, "crop_size: expected multiples of 14, got 30x28"),
        ({"stride": (29, 28)}, r"stride: expected 1 to crop_size=\(28, 28\), got \(29, 28\)"),
        ({"stride": (0, 28)}, "stride"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
    ],
)
def test_bad_windows(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        slide_inference(network, torch.randn(1, 3, 56, 56), **{"crop_size": (28, 28), "stride": (14, 14), **settings})


def test_miou_by_hand() -> None:
    pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
    from internvit.dense.segmentation import score

    labels = torch.tensor([[0, 0, 1, 1], [1, 2, IGNORE, 0]])
    predicted = torch.tensor([[0, 1, 1, 1], [1, 0, 3, 0]])
    scores = score([(predicted[:1], labels[:1]), (predicted[1:], labels[1:])], num_classes=5)
    # 0: 2 of 4 (0,0,7 true; 0,5,7 said); 1: 3 of 4; 2: 0 of 1; 3: said only where nothing is known; 4: nowhere
    assert scores.iou[:3] == pytest.approx((2 / 4, 3 / 4, 0.0))
    assert all(x != x for x in scores.iou[3:])
    assert scores.miou == pytest.approx((0.5 + 0.75 + 0) / 3)
    assert scores.accuracy == pytest.approx(5 / 7)
    with pytest.raises(ValueError, match="got none but 255"):
        score([(predicted, torch.full_like(labels, IGNORE))], num_classes=3)


def test_miou_is_that_of_a_loop_over_random_classes() -> None:
    pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
    from internvit.dense.segmentation import score

    pairs = [(torch.randint(0, 6, (9, 7)), torch.randint(0, 7, (9, 7))) for _ in range(4)]
    pairs = [(p, torch.where(t == 6, IGNORE, t)) for p, t in pairs]
    predicted, labels = (torch.cat(x) for x in zip(*pairs, strict=True))
    predicted, labels = predicted[labels != IGNORE], labels[labels != IGNORE]
    expected = [
        ((predicted == k) & (labels == k)).sum().item() / ((predicted == k) | (labels == k)).sum().item()
        for k in range(6)
    ]
    assert score(pairs, 6).iou == pytest.approx(expected)


ONES = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("predicted", "labels", "error", "message"),
    [
        (ONES * 3, ONES, ValueError, "predictions: pair 1: expected predicted classes from 0 to 2, got 3"),
        (ONES * IGNORE, ONES, ValueError, "predictions: pair 1: expected predicted classes from 0 to 2, got 255"),
        (ONES - 2, ONES, ValueError, "predictions: pair 1: expected predicted classes from 0 to 2, got -1"),
        (ONES, ONES * 3, ValueError, "predictions: pair 1: expected true classes from 0 to 2 or 255, got 3"),
        (ONES, ONES - 2, ValueError, "predictions: pair 1: expected true classes from 0 to 2 or 255, got -1"),
        (ONES.T, ONES, ValueError, r"pair 1: expected .* classes of one shape, got \[3, 2\] and \[2, 3\]"),
        (ONES[None], ONES, ValueError, r"of one shape, got \[1, 2, 3\] and \[2, 3\]"),
        (ONES.float(), ONES, TypeError, r"expected predicted classes that are integers, got torch\.float32"),
        (ONES, ONES.half(), TypeError, r"expected true classes that are integers, got torch\.float16"),
    ],
)
def test_classes_that_cannot_be_scored_are_named(predicted, labels, error, message) -> None:
    pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
    from internvit.dense.segmentation import score

    with pytest.raises(error, match=message):
        score([(ONES, ONES), (predicted, labels)], num_classes=3)


def test_classes_of_any_integer_dtype_and_predictions_where_nothing_is_known() -> None:
    pytest.importorskip("torchmetrics", reason="the segmentation extra is not installed")
    from internvit.dense.segmentation import score

    predicted, labels = torch.tensor([0, 1, 2, 200]), torch.tensor([0, 1, 1, IGNORE])
    expected = score([(predicted, labels)], num_classes=3)
    assert expected.iou == pytest.approx((1, 1 / 2, 0))
    assert score([(predicted.byte(), labels.byte())], num_classes=3) == expected
    assert score([(predicted[:2] == 1, labels[:2].char())], num_classes=2).iou == (1, 1)
    with pytest.raises(ValueError, match=r"num_classes: expected 2 to 255, .* got 1; the background is a class too"):
        score([(predicted, labels)], num_classes=1)
