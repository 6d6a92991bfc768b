"""Folders of images and masks: what does not fit is named and counted; order and samples follow from seeds."""

import itertools
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from internvit.dense.segmentation import IGNORE, find_pairs
from internvit.dense.segmentation.augment import Augmentation, fitted
from internvit.dense.segmentation.folder import Pair, batches, read_mask, read_pair
from internvit.images import MEAN, STD


def write(folder, name: str, size=(40, 30), classes=None) -> Pair:
    image, mask = folder / "images" / f"{name}.png", folder / "masks" / f"{name}.png"
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(image)
    drawn = rng.integers(0, 3, (size[1], size[0]), dtype=np.uint8) if classes is None else classes
    Image.fromarray(drawn).save(mask)
    return Pair(image, mask)


def find(folder, **settings):
    return find_pairs(folder / "images", folder / "masks", 3, **settings)


def broken(folder) -> dict:
    """One file of each kind that does not fit, beside two that do; what is to be said of it."""
    write(folder, "good")
    write(folder, "sub/fine")
    cut = write(folder, "cut").image
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    noise = write(folder, "noise").image
    noise.write_bytes(b"no image")
    empty = write(folder, "empty").mask
    empty.write_bytes(b"")
    other = write(folder, "other", classes=np.zeros((30, 41), np.uint8)).mask
    high = write(folder, "high", classes=np.full((30, 40), 7, np.uint8)).mask
    colour = write(folder, "colour", classes=np.zeros((30, 40, 3), np.uint8)).mask
    lonely = write(folder, "lonely")
    lonely.mask.unlink()
    orphan = write(folder, "orphan")
    orphan.image.unlink()
    return {
        cut: "broken image",
        noise: "not an image that Pillow can read",
        empty: "not an image that Pillow can read",
        other: r"expected its image's size 30x40 \(height x width\), got 30x41",
        high: "expected classes from 0 to 2 or 255, got 7",
        colour: "expected a mask of one 8-bit channel",
        lonely.image: "no mask",
        orphan.mask: "a mask without its image",
    }


def test_what_does_not_fit_is_named_counted_and_left_out(tmp_path, caplog) -> None:
    expected = broken(tmp_path)
    result = find(tmp_path, on_broken="skip")
    assert [pair.image.name for pair in result.pairs] == ["good.png", "fine.png"]
    assert result.left_out.keys() == expected.keys()
    for path, why in expected.items():
        assert re.search(why, result.left_out[path])
        assert str(path) in result.left_out[path]
        assert str(path) in caplog.text
    assert "8 files do not fit; 2 of 9 images are used" in caplog.text


def test_or_is_an_error_that_names_it(tmp_path) -> None:
    expected = broken(tmp_path)
    for _ in range(len(expected)):
        with pytest.raises(ValueError, match=r".+") as error:
            find(tmp_path)
        (path,) = [p for p in expected if str(error.value).startswith(str(p))]
        for file in (tmp_path / "images" / path.name, tmp_path / "masks" / path.name):
            file.unlink(missing_ok=True)
    assert len(find(tmp_path).pairs) == 2


def test_nothing_left_two_images_for_one_mask_and_missing_folders(tmp_path) -> None:
    pair = write(tmp_path, "a")
    pair.mask.unlink()
    with pytest.raises(ValueError, match="none of 1 images has a mask that fits"):
        find(tmp_path, on_broken="skip")
    pair = write(tmp_path, "a")
    Image.open(pair.image).save(pair.image.with_suffix(".bmp"))
    with pytest.raises(ValueError, match="expected one image for it"):
        find(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        find_pairs(tmp_path / "images", tmp_path / "nowhere", 3)
    with pytest.raises(ValueError, match="on_broken: expected one of raise, skip, got 'ignore'"):
        find(tmp_path, on_broken="ignore")


def test_palettes_and_ade20ks_zero(tmp_path) -> None:
    classes = np.array([[0, 1, 2, 255]], np.uint8)
    palette = Image.fromarray(classes)
    palette.putpalette([i for i in range(256) for _ in range(3)])
    assert palette.mode == "P"
    palette.save(tmp_path / "p.png")
    assert read_mask(tmp_path / "p.png", 3).tolist() == [[0, 1, 2, 255]]
    assert read_mask(tmp_path / "p.png", 2, reduce_zero_label=True).tolist() == [[255, 0, 1, 255]]


@pytest.mark.parametrize("colour", [0, 3], ids=["grey", "palette"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_have_the_classes_that_are_stored(bits, colour, tmp_path) -> None:
    """Pillow stretches grey of 1, 2 and 4 bits to 0 ... 255."""
    classes = np.random.default_rng(bits).integers(0, min(2**bits, 16), (5, 7), np.uint8)
    classes[0, :2] = 0, min(2**bits, 16) - 1
    (tmp_path / "a.png").write_bytes(png(classes, bits, colour))
    assert np.array_equal(read_mask(tmp_path / "a.png", 150), classes)
    reduced = read_mask(tmp_path / "a.png", 150, reduce_zero_label=True)
    assert np.array_equal(reduced, np.where(classes == 0, IGNORE, classes.astype(int) - 1))
    with pytest.raises(ValueError, match=f"expected classes from 0 to {classes.max() - 1} or 255, got {classes.max()}"):
        read_mask(tmp_path / "a.png", int(classes.max()))


def png(values: np.ndarray, bits: int, colour: int) -> bytes:
    """A PNG of one channel, which Pillow writes with 8 bits only; colour 0 is grey, 3 a palette."""
    height, width = values.shape
    codes = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(height, -1)
    rows = b"".join(b"\0" + np.packbits(row).tobytes() for row in codes)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(3 * 2 ** min(bits, 4)))) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + header + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_batches_are_shuffles_known_from_seed_and_number() -> None:
    first = list(itertools.islice(batches(7, 3, seed=5), 14))
    flat = list(itertools.chain(*first))
    for epoch in range(6):
        assert sorted(flat[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert flat[:7] != flat[7:14]
    assert list(itertools.islice(batches(7, 3, seed=5, start=4), 10)) == first[4:]
    assert list(itertools.islice(batches(7, 3, seed=6), 14)) != first
    assert next(batches(2, 5, seed=0)) != []


def test_samples_follow_from_their_generator(tmp_path) -> None:
    image, classes = read_pair(write(tmp_path, "a", (90, 60)), 3)
    make = Augmentation(crop=28, short_side=40, long_side=160)
    a, b, c = (make(image, classes, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    assert not torch.equal(a[0], c[0])
    assert a[0].shape == (3, 28, 28)
    assert a[1].dtype == torch.int64


def test_mask_and_image_move_together() -> None:
    """The image shows its classes: every sample must still agree with itself."""
    classes = np.kron(np.random.default_rng(0).integers(0, 3, (6, 8)), np.ones((20, 20))).astype(np.uint8)
    image = np.repeat(classes[..., None] * 100, 3, -1).astype(np.uint8)
    make = Augmentation(crop=84, short_side=100, long_side=400, jitter=False)
    for seed in range(20):
        pixels, labels = make(image, classes, np.random.default_rng(seed))
        shown = (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))[0] * 255 / 100
        known = labels != IGNORE
        assert known.any()
        assert (shown[known].round() == labels[known]).float().mean() > 0.9  # but for blurred edges
        assert (pixels[:, ~known] == 0).all(), "padded with the mean colour"


def test_a_crop_of_one_class_is_drawn_again() -> None:
    classes = np.zeros((40, 400), np.uint8)
    classes[:, 380:] = 1
    image = np.repeat(classes[..., None], 3, -1)
    plain = Augmentation(crop=40, short_side=40, long_side=400, ratio=(1, 1), jitter=False)
    picky = [plain(image, classes, np.random.default_rng(s))[1].unique().numel() for s in range(30)]
    lax = Augmentation(crop=40, short_side=40, long_side=400, ratio=(1, 1), jitter=False, max_class_ratio=1)
    loose = [lax(image, classes, np.random.default_rng(s))[1].unique().numel() for s in range(30)]
    assert sum(picky) > sum(loose) + 5


def test_fitted_is_mmcvs_keep_ratio() -> None:
    assert fitted((683, 512), 504, 2016) == (672, 504)
    assert fitted((4000, 500), 504, 2016) == (2016, 252)
    assert fitted((10, 1000), 5, 5) == (1, 5)


@pytest.mark.parametrize("error", [RuntimeError("decoder"), MemoryError(), KeyError("tag")])
def test_any_exception_of_a_decoder_names_the_mask(error, tmp_path, monkeypatch) -> None:
    pair = write(tmp_path, "a")

    def fails(self, *args):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    with pytest.raises(ValueError, match=r"a\.png: broken mask: \S+"):
        read_mask(pair.mask, 3)


def test_images_that_cannot_be_read_are_named(tmp_path) -> None:
    write(tmp_path, "a")
    for name in ("b.heic", "c.CR2"):
        shutil.copy(write(tmp_path, name[0]).image, tmp_path / "images" / name)
        (tmp_path / "images" / f"{name[0]}.png").unlink()
    (tmp_path / "images" / "b.heic").write_bytes(bytes(100))
    result = find(tmp_path, on_broken="skip")
    assert [path.name for path in result.left_out] == ["b.heic", "c.CR2"]
    assert len(result.pairs) == 1
