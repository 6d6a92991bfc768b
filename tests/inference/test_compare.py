"""`compare_precisions` and `internvit precision`: errors are those of the optimised models, block by block."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import internvit
from internvit.images import load_pixels
from internvit.inference import linear_int8
from internvit.inference.compare import compare_precisions
from internvit.numerics import relative_error
from tests.cli.test_app import call, photos, weights  # noqa: F401 (fixtures)
from tests.inference.test_optimize import VARIANTS, small_model

pytestmark = pytest.mark.skipif(
    linear_int8.unavailable_reason() is not None, reason=str(linear_int8.unavailable_reason())
)


def test_errors_are_those_of_the_optimised_models() -> None:
    model = small_model(VARIANTS[0], torch.float32, 0)
    images = [torch.randn(1, 3, 112, 112) for _ in range(2)]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    skip = ["encoder.layers.1", "*.proj"]
    report = compare_precisions(model, images, skip)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    half = internvit.InternViT(model.config).eval()
    half.load_state_dict(before)
    half.bfloat16()
    with torch.no_grad():
        truth = [model(x, output_hidden_states=True).hidden_states for x in images]

    def outputs(**settings: object) -> list[tuple]:
        fast = internvit.optimize_for_inference(half, out_dtype=torch.float32, **settings)
        return [fast(x, output_hidden_states=True).hidden_states for x in images]

    plain = outputs()
    for errors, settings in ((report.bfloat16, {}), (report.int8, {"precision": "int8", "skip": skip})):
        ours = outputs(**settings)
        assert len(errors) == 4
        for i, error in enumerate(errors):
            actual, expected = (torch.cat([states[i] for states in every]) for every in (ours, truth))
            assert error.relative == pytest.approx(relative_error(actual, expected))
            channels = (actual - expected).double().square().sum((0, 1)) / expected.double().square().sum((0, 1))
            assert error.channel == pytest.approx(channels.sqrt().median().item())
            assert error.cosine == pytest.approx(torch.cosine_similarity(actual, expected, dim=-1).min().item())
    assert report.skipped == [
        *("encoder.layers.0.attn.proj", "encoder.layers.1.attn.qkv", "encoder.layers.1.attn.proj"),
        *("encoder.layers.1.mlp.fc1", "encoder.layers.1.mlp.fc2", "encoder.layers.2.attn.proj"),
    ]
    for settings, ours in zip(
        ({}, {"precision": "int8", "skip": skip}), zip(*report.features, strict=True), strict=True
    ):
        for features, expected in zip(ours, outputs(**settings), strict=True):
            assert torch.equal(features, expected[-1])
    alone = outputs(precision="int8", skip=["encoder.layers.0", "encoder.layers.1"])
    actual, expected = (torch.cat([states[-1] for states in every]).double() for every in (alone, plain))
    channels = (actual - expected).square().sum((0, 1)) / expected.square().sum((0, 1))
    assert report.alone[2] == pytest.approx(channels.sqrt().median().item())


def test_a_block_that_int8_spoils_is_named() -> None:
    model = small_model(VARIANTS[0], torch.float32, 0)
    with torch.no_grad():  # one channel of a thousand times the size leaves int8 no room for the others
        model.encoder.layers[1].norm2.weight[5] = 1000.0
        model.encoder.layers[1].mlp.fc1.weight[:, 5] /= 1000.0
    report = compare_precisions(model, [torch.randn(1, 3, 112, 112)], skip=())
    assert report.alone[1] > 5 * max(report.alone[0], report.alone[2])


def test_wrong_arguments_are_clear_errors() -> None:
    with pytest.raises(ValueError, match=r"model must be float32, got torch\.bfloat16"):
        compare_precisions(small_model(VARIANTS[0], torch.bfloat16, 0), [])
    with pytest.raises(ValueError, match="images must have at least one, got none"):
        compare_precisions(small_model(VARIANTS[0], torch.float32, 0), [])


def test_the_command(weights: Path, photos: Path, tmp_path, capsys) -> None:  # noqa: F811
    arguments = ["precision", photos, "--weights", weights, "--skip", "encoder.layers.2"]
    printed = json.loads(call(capsys, *arguments, "--json")[0])
    model = internvit.InternViT.from_pretrained(weights)
    images = [load_pixels(path, (56, 56))[None] for path in sorted(photos.iterdir())]
    report = compare_precisions(model, images, ["encoder.layers.2"])
    assert [e["relative"] for e in printed["int8"]] == pytest.approx([e.relative for e in report.int8])
    assert printed["skipped"] == report.skipped
    picture = tmp_path / "pca.png"
    table, _ = call(capsys, *arguments, "--pca", picture)
    width, height = Image.open(picture).size
    assert width == pytest.approx(height / len(images) * 3.5 * 3 / 3.4, rel=0.02), "not a photograph and two maps a row"
    assert "expected a suffix" in call(capsys, *arguments, "--pca", "x.safetensors", code=2)[1]
    assert "6 images at 56x56, against float32" in table
    assert f"{report.int8[-1].relative:.2%}" in table
    assert "in bfloat16: encoder.layers.2.attn.qkv" in table
    assert "names none" in call(capsys, *arguments[:-1], "encoder.layers.9", code=2)[1]
    assert "Example" in call(capsys, "precision", "--help")[0]
    assert "name the network" in call(capsys, "precision", photos, code=2)[1]


def test_a_picture_replaces_no_file_unasked_and_no_photograph(weights: Path, tmp_path, capsys) -> None:  # noqa: F811
    image, picture = tmp_path / "a.png", tmp_path / "new" / "pca.png"
    Image.new("RGB", (28, 28), "red").save(image)
    before = image.read_bytes()
    arguments = ["precision", image, "--weights", weights, "--size", "28", "--pca"]
    call(capsys, *arguments, picture)
    assert "exists; give another --pca, or --overwrite" in call(capsys, *arguments, picture, code=2)[1]
    call(capsys, *arguments, picture, "--overwrite")
    (tmp_path / "link.png").hardlink_to(image)
    for name in ("a.png", "link.png"):
        for overwrite in ((), ("--overwrite",)):
            printed = call(capsys, *arguments, tmp_path / name, *overwrite, code=2)[1]
            assert "is one of the images" in " ".join(printed.split())
    assert image.read_bytes() == before


def test_features_in_int8_and_a_resume_in_another_precision(weights: Path, photos: Path, tmp_path, capsys) -> None:  # noqa: F811
    from safetensors import safe_open

    out = tmp_path / "features.safetensors"
    arguments = ["features", photos, "--weights", weights, "--out", out]
    call(capsys, *arguments, "--precision", "int8", "--skip", "encoder.layers.2")
    model = internvit.InternViT.from_pretrained(weights, dtype=torch.bfloat16)
    fast = internvit.optimize_for_inference(model, precision="int8", skip=["encoder.layers.2"])
    image = min(photos.iterdir())
    with safe_open(out, "pt") as file:
        assert torch.equal(file.get_tensor(f"{image}:last"), fast(load_pixels(image, (56, 56))[None])[0][0])
        settings = file.metadata()["precision"]
    assert settings == fast.settings
    others = [internvit.optimize_for_inference(model, precision=p).settings for p in (None, "int8")]
    assert len({settings, *others}) == 3
    for options, message in (
        (("--precision", "int8", "--dtype", "float32"), "computes in bfloat16, got --dtype float32"),
        (("--skip", "a"), "--skip names Linears that"),
        (("--precision", "fp8"), "needs a model on a CUDA device"),
        (("--precision", "int8", "--skip", "a"), "which names none"),
        (("--precision", "bf16", "--skip", "a"), "which names none"),
    ):
        printed = call(capsys, *arguments[:-1], tmp_path / "other.safetensors", *options, code=2)[1]
        assert message in " ".join(printed.split())


def test_features_into_a_folder_in_int8(weights: Path, photos: Path, tmp_path, capsys) -> None:  # noqa: F811
    parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
    out = tmp_path / "features"
    arguments = ["features", photos, "--weights", weights, "--out", out, "--pooling", "mean"]
    call(capsys, *arguments, "--precision", "int8", "--skip", "encoder.layers.2")
    model = internvit.InternViT.from_pretrained(weights, dtype=torch.bfloat16)
    fast = internvit.optimize_for_inference(model, precision="int8", skip=["encoder.layers.2"])
    table = parquet.read_table(out / "data")
    images = [Path(name) for name in table["path"].to_pylist()]
    pixels = torch.stack([load_pixels(image, (56, 56)) for image in images])
    expected = fast(pixels).last_hidden_state[:, 1:].float().mean(1)
    torch.testing.assert_close(torch.tensor(table["features"].to_pylist()), expected)
    for options, message in (
        (("--precision", "int8"), "precision"),
        ((), "dtype"),
        (("--precision", "int8", "--dtype", "float32"), "computes in bfloat16, got --dtype float32"),
        (("--skip", "a"), "--skip names Linears that"),
    ):
        assert message in " ".join(call(capsys, *arguments, *options, code=2)[1].split())


def test_parts_of_another_precision_are_not_taken_up(weights: Path, photos: Path, tmp_path, monkeypatch) -> None:  # noqa: F811
    from internvit.data.extract import extract

    model = internvit.InternViT.from_pretrained(weights, dtype=torch.bfloat16)
    images, out = sorted(photos.iterdir())[:2], tmp_path / "features.safetensors"

    def interrupted(paths, total):
        yield paths[0]
        raise KeyboardInterrupt

    for precision, other in (("int8", None), ("bf16", "int8")):
        fast, slow = (internvit.optimize_for_inference(model, precision=p) for p in (precision, other))
        with pytest.raises(KeyboardInterrupt):
            extract(fast, images, out, (56, 56), progress=interrupted, overwrite=True)
        with pytest.raises(ValueError, match="precision"):
            extract(slow, images, out, (56, 56))
        assert extract(fast, images, out, (56, 56), overwrite=False).resumed == 1
        out.unlink()


def test_the_self_check_in_int8(capsys, monkeypatch) -> None:
    import internvit.cli.selfcheck as selfcheck

    small = internvit.InternViTConfig(
        image_size=112, hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=256
    )
    monkeypatch.setattr(internvit.InternViTConfig, "from_name", lambda name, **_: small)
    printed = json.loads(call(capsys, "check", "--precision", "int8", "--quick", "--seed", "1", "--json")[0])
    assert [(r["dtype"], r["failures"]) for r in printed] == [("int8", [])]
    assert 1e-3 < printed[0]["error"] < 0.05
    monkeypatch.setattr(selfcheck, "emulate_int8", lambda model, names: model.float())
    broken = json.loads(call(capsys, "check", "--precision", "int8", "--quick", "--json", code=1)[0])
    assert "in int8, allowed" in broken[0]["failures"][0], "a bound without the int8 operands does not fail"
