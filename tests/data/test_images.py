"""Thirty odd image files: the right pixels, or an error that names the file."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from internvit import tile_image
from internvit.data import storage
from internvit.images import MEAN, STD, find_images, load_pixels, open_photo, to_pixels

RAMP = np.linspace(0, 255, 24 * 36).reshape(24, 36)
COLOUR = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], -1).round().astype(np.uint8)
GREY = RAMP.round().astype(np.uint8)
SIXTEEN = (GREY.astype(np.uint16) * 257).astype(np.uint16)


def save(path: Path, image: Image.Image, **settings) -> Path:
    image.save(path, **settings)
    return path


def rotated(path: Path, orientation: int) -> Path:
    """A photo whose EXIF says how to turn it upright; the stored pixels are turned the other way."""
    turns = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = Image.fromarray(COLOUR)
    stored = upright if turns[orientation] is None else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif, quality=100, subsampling=0)
    return path


def alpha(mode: str) -> Image.Image:
    image = Image.fromarray(COLOUR).convert(mode)
    image.putalpha(Image.fromarray(np.where(np.arange(36) < 18, 255, 0).astype(np.uint8)[None].repeat(24, 0)))
    return image


def palette_with_transparency() -> Image.Image:
    image = Image.fromarray(COLOUR).quantize(255)
    return image


GOOD = {
    "rgb.png": lambda p: save(p, Image.fromarray(COLOUR)),
    "rgb.bmp": lambda p: save(p, Image.fromarray(COLOUR)),
    "rgb.tif": lambda p: save(p, Image.fromarray(COLOUR)),
    "rgb.ppm": lambda p: save(p, Image.fromarray(COLOUR)),
    "rgb.tga": lambda p: save(p, Image.fromarray(COLOUR)),
    "lossless.webp": lambda p: save(p, Image.fromarray(COLOUR), lossless=True),
    "interlaced.png": lambda p: save(p, Image.fromarray(COLOUR), optimize=True),
    "best.jpg": lambda p: save(p, Image.fromarray(COLOUR), quality=100, subsampling=0),
    "progressive.jpg": lambda p: save(p, Image.fromarray(COLOUR), quality=100, subsampling=0, progressive=True),
    **{f"exif{i}.jpg": lambda p, i=i: rotated(p, i) for i in range(1, 9)},
    "CAPITALS.JPG": lambda p: save(p, Image.fromarray(COLOUR), quality=100, subsampling=0),
    "with space and ü.png": lambda p: save(p, Image.fromarray(COLOUR)),
}
GREYS = {
    "grey.png": lambda p: save(p, Image.fromarray(GREY)),
    "grey.jpg": lambda p: save(p, Image.fromarray(GREY), quality=100),
    "sixteen.png": lambda p: save(p, Image.fromarray(SIXTEEN)),
    "sixteen.tif": lambda p: save(p, Image.fromarray(SIXTEEN)),
    "sixteen.pgm": lambda p: save(p, Image.fromarray(SIXTEEN)),
    "thirty-two.tif": lambda p: save(p, Image.fromarray(SIXTEEN.astype(np.int32))),
}
BROKEN = {
    "empty.jpg": lambda p: p.write_bytes(b""),
    "text.jpg": lambda p: p.write_text("not an image"),
    "truncated.png": lambda p: p.write_bytes(_bytes("png")[:200]),
    "truncated.jpg": lambda p: p.write_bytes(_bytes("jpeg")[:400]),
    "flipped.png": lambda p: p.write_bytes(_flipped(_bytes("png"))),
    "float.tif": lambda p: save(p, Image.fromarray(RAMP.astype(np.float32))),
    "range.tif": lambda p: save(p, Image.fromarray(np.full((4, 4), 70000, np.int32))),
    "eight-in-thirty-two.tif": lambda p: save(p, Image.fromarray(GREY.astype(np.int32))),
}


def _bytes(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 64]) + data[middle + 64 :]


def test_there_are_thirty_files() -> None:
    assert len(GOOD) + len(GREYS) + len(BROKEN) + len(TRANSPARENT) >= 30


@pytest.mark.parametrize("name", GOOD)
def test_colour(name, tmp_path) -> None:
    GOOD[name](tmp_path / name)
    photo = open_photo(tmp_path / name)
    assert (photo.mode, photo.size) == ("RGB", (36, 24))
    difference = np.abs(np.asarray(photo).astype(int) - COLOUR.astype(int))
    assert difference.max() <= (0 if not name.lower().endswith("jpg") else 6)


@pytest.mark.parametrize("name", GREYS)
def test_grey_and_16_bits(name, tmp_path) -> None:
    GREYS[name](tmp_path / name)
    photo = open_photo(tmp_path / name)
    assert photo.mode == "RGB"
    difference = np.abs(np.asarray(photo).astype(int) - GREY.astype(int)[..., None])
    assert difference.max() <= (0 if not name.endswith("jpg") else 3)


@pytest.mark.parametrize("kind", ["png", "tif", "pgm"])
def test_dark_images_of_16_bits_stay_dark(kind, tmp_path) -> None:
    """Values of 8 bits mean 8 bits in no file of 16."""
    path = save(tmp_path / f"dark.{kind}", Image.fromarray(np.full((24, 36), 200, np.uint16)))
    assert (np.asarray(open_photo(path)) == 1).all()


TRANSPARENT = {
    "rgba.png": lambda p: save(p, alpha("RGB")),
    "rgba.webp": lambda p: save(p, alpha("RGB"), lossless=True),
    "rgba.tif": lambda p: save(p, alpha("RGB")),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_laid_over_white(name, tmp_path) -> None:
    TRANSPARENT[name](tmp_path / name)
    pixels = np.asarray(open_photo(tmp_path / name))
    assert (pixels[:, :18] == COLOUR[:, :18]).all()
    assert (pixels[:, 18:] == 255).all()


def test_grey_with_alpha_palettes_one_bit_cmyk_and_animations(tmp_path) -> None:
    la = np.asarray(open_photo(save(tmp_path / "la.png", alpha("L"))))
    assert (la[:, 18:] == 255).all()
    assert (la[:, 0, 0] == la[:, 0, 2]).all()
    palette = np.asarray(open_photo(save(tmp_path / "palette.png", palette_with_transparency())))
    assert np.abs(palette.astype(int) - COLOUR).mean() < 12
    see_through = palette_with_transparency()
    see_through.save(tmp_path / "see-through.png", transparency=see_through.getpixel((0, 0)))
    assert (np.asarray(open_photo(tmp_path / "see-through.png"))[0, 0] == 255).all()
    one = np.asarray(open_photo(save(tmp_path / "one.png", Image.fromarray(GREY > 127))))
    assert set(np.unique(one)) == {0, 255}
    cmyk = open_photo(save(tmp_path / "cmyk.jpg", Image.fromarray(COLOUR).convert("CMYK"), quality=100))
    assert np.abs(np.asarray(cmyk).astype(int) - COLOUR).max() <= 12
    frames = [Image.fromarray(np.full((8, 8, 3), v, np.uint8)) for v in (10, 200)]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert np.abs(np.asarray(open_photo(tmp_path / "two.gif")).astype(int) - 10).max() <= 1


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_named(name, tmp_path) -> None:
    BROKEN[name](tmp_path / name)
    with pytest.raises(ValueError, match=name):
        open_photo(tmp_path / name)


def test_pixels_are_normalised_and_resized(tmp_path) -> None:
    path = save(tmp_path / "flat.png", Image.new("RGB", (50, 40), (255, 0, 128)))
    pixels = load_pixels(path, (28, 42))
    assert pixels.shape == (3, 28, 42)
    for channel, value in enumerate((1.0, 0.0, 128 / 255)):
        torch.testing.assert_close(pixels[channel], torch.full((28, 42), (value - MEAN[channel]) / STD[channel]))
    assert torch.equal(to_pixels(open_photo(path), (28, 42)), pixels)


def test_linked_folders_are_followed_once(tmp_path, caplog) -> None:
    """Datasets are put together by links, also to folders that lie elsewhere or in a circle."""
    elsewhere, photos = tmp_path / "elsewhere", tmp_path / "photos"
    for name in (photos / "a" / "1.png", photos / "b" / "2.png", elsewhere / "3.png", elsewhere / "deep" / "4.png"):
        name.parent.mkdir(parents=True, exist_ok=True)
        name.touch()
    (photos / "a" / "again").symlink_to(photos / "b")
    (photos / "all").symlink_to(photos)
    (photos / "a" / "up").symlink_to(tmp_path)
    (photos / "far").symlink_to(elsewhere)
    (elsewhere / "deep" / "round").symlink_to(photos / "a")
    expected = ["a/1.png", "b/2.png", "far/3.png", "far/deep/4.png"]
    assert [str(p.relative_to(photos)) for p in find_images([photos])] == expected
    assert sorted(entry.path for entry in storage.walk(str(photos))) == [str(photos / name) for name in expected]
    (photos / "link").symlink_to(photos / "b")
    assert [p.name for p in find_images([photos / "link"])] == ["2.png"]
    assert not caplog.records


def test_folders_that_cannot_be_listed_are_logged(tmp_path, caplog, monkeypatch) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str):  # type: ignore[no-untyped-def]
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [p.name for p in find_images([tmp_path])] == ["a.png"]
    assert f"{tmp_path / 'closed'}: cannot be listed: Permission denied" in caplog.text


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_pixels_do_not_depend_on_the_default_dtype(default) -> None:
    """In bfloat16 the mean and the deviation would be rounded by up to 0.4 %."""
    image = Image.fromarray(COLOUR)
    expected = to_pixels(image, (28, 42)), tile_image(image, 56)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = to_pixels(image, (28, 42)), tile_image(image, 56)
    finally:
        torch.set_default_dtype(before)
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, wanted)


def test_files_folders_and_globs(tmp_path, monkeypatch) -> None:
    (tmp_path / "a" / "deep").mkdir(parents=True)
    for name in ("a/2.png", "a/1.JPG", "a/deep/3.webp", "b.png"):
        Image.fromarray(COLOUR).save(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    names = [str(p.relative_to(tmp_path)) for p in find_images([tmp_path / "a", tmp_path / "b.png", tmp_path / "a"])]
    assert names == ["a/1.JPG", "a/2.png", "a/deep/3.webp", "b.png"]
    monkeypatch.chdir(tmp_path)
    assert list(map(str, find_images(["**/*.png"]))) == ["a/2.png", "b.png"]
    assert len(find_images([f"{tmp_path}/*/*.png"])) == 1
    with pytest.raises(FileNotFoundError, match="no image at nothing/"):
        find_images(["b.png", "nothing/*.png"])
