"""Extraction: what cannot be read is named, what is somebody else's stays, and a resumed run mixes nothing."""

import os
import shutil
import stat
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import internvit.cli.app
from internvit import InternViT, InternViTConfig
from internvit.data import parts
from internvit.data.extract import extract
from internvit.files import locked
from internvit.images import find_images, load_pixels, open_photo
from tests.support import ROOT
from tests.support.models import random_weights

CONFIG = InternViTConfig(
    image_size=28, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64
)


@pytest.fixture(scope="module")
def model() -> InternViT:
    made = InternViT(CONFIG)
    random_weights(made)
    return made.eval()


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (30, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)
    return path


def photos(folder: Path, count: int = 4) -> list[Path]:
    return [photo(folder / f"{i}.png", i) for i in range(count)]


class StopError(Exception):
    pass


def interrupted(model, images, out, after: int = 2, **settings) -> Path:
    """A run that ends after some images, and its folder of parts."""

    def progress(waiting, total):
        for i, path in enumerate(waiting):
            if i == after:
                raise StopError
            yield path

    with pytest.raises(StopError):
        extract(model, images, out, (28, 28), progress=progress, **settings)
    return out.with_name(out.name + ".partial")


def check_whole(model, images, out) -> None:
    features = load_file(out)
    assert features.keys() == {f"{path}:last" for path in images}
    for path in images:
        with torch.inference_mode():
            expected = model(load_pixels(path, (28, 28))[None]).last_hidden_state[0]
        assert torch.equal(features[f"{path}:last"], expected)


def undecodable(folder: Path) -> list[Path]:
    """Files on which Pillow, or what is around it, fails in many ways."""
    folder.mkdir(exist_ok=True)
    for name in ("good", "avif", "jp2", "exif"):
        photo(folder / f"{name}.png", size=(64, 64))
    picture = Image.open(folder / "avif.png")
    made = [folder / name for name in ("damaged.avif", "damaged.jp2", "exif.jpg", "photo.HEIC", "camera.nef")]
    picture.save(made[0])
    made[0].write_bytes(made[0].read_bytes()[: made[0].stat().st_size // 2])
    picture.save(made[1])
    made[1].write_bytes(made[1].read_bytes()[:300])
    # Turned, and one tag has text where integers are written: exif_transpose raises struct.error.
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\x01\x03\0\x02\0\0\0\x02x\0\0\0\0\0\0\0"
    picture.save(made[2], exif=exif)
    made[3].write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(64))
    picture.save(made[4], format="tiff")  # Pillow reads the preview of a raw file as if it were the picture
    for name in ("avif", "jp2", "exif"):
        (folder / f"{name}.png").unlink()
    made.append(folder / "dangling.png")
    made[-1].symlink_to(folder / "nowhere.png")
    made.append(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")))
    shutil.copy(folder / "good.png", made[-1])
    return made


def test_files_that_cannot_be_read_are_named_and_the_run_goes_on(model, tmp_path, caplog) -> None:
    bad = undecodable(tmp_path / "in")
    images = find_images([tmp_path / "in"])
    assert set(images) == {*bad, tmp_path / "in" / "good.png"}
    result = extract(model, images, tmp_path / "out", (28, 28))
    assert result.images == [tmp_path / "in" / "good.png"]
    assert set(result.skipped) == set(bad)
    for path in bad:
        name = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        assert name in result.skipped[path]
        assert name in caplog.text
        (result.skipped[path] + caplog.text).encode()  # can be printed
    with pytest.raises(ValueError, match=bad[0].name):
        extract(model, [bad[0]], tmp_path / "strict", (28, 28), strict=True)


@pytest.mark.parametrize(
    "error", [RuntimeError("decoder"), struct.error("unpack"), MemoryError(), KeyError("tag"), ZeroDivisionError()]
)
def test_any_exception_of_a_decoder_names_the_file(error, tmp_path, monkeypatch) -> None:
    path = photo(tmp_path / "a.png")

    def fails(self, *args):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fails)
    with pytest.raises(ValueError, match=r"a\.png: broken image: \S+"):
        open_photo(path)


def test_a_pipe_and_a_folder_are_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"pipe\.png: not a regular file"):
        open_photo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match=r"folder\.png: not a regular file"):
        open_photo(tmp_path / "folder.png")
    with pytest.raises(FileNotFoundError, match="no image at"):
        find_images([tmp_path])


def test_names_that_are_not_utf8_on_the_command_line(model, tmp_path, capsys) -> None:
    model.save_pretrained(tmp_path / "weights")
    undecodable(tmp_path / "in")
    call = ["features", tmp_path / "in", "--weights", tmp_path / "weights", "--out", tmp_path / "o.safetensors"]
    with pytest.raises(SystemExit) as done:
        internvit.cli.app.run([str(a) for a in call])
    stdout, stderr = capsys.readouterr()
    assert done.value.code == 0, stderr
    assert "1 images" in stdout
    assert "caf\\xe9.png" in stderr.replace("\n", "")
    with pytest.raises(SystemExit) as done:
        internvit.cli.app.run(["features", os.fsdecode(b"/caf\xe9.png"), "--weights", "w", "--out", "o.safetensors"])
    assert done.value.code == 2
    assert "caf\\xe9.png" in capsys.readouterr()[1]


def test_damaged_parts_are_computed_again(model, tmp_path) -> None:
    images, out = photos(tmp_path / "in"), tmp_path / "out"
    folder = interrupted(model, images, out, after=3)
    first, second, third = sorted(folder.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-5])
    second.write_bytes(b"")
    third.write_bytes(os.urandom(100))
    result = extract(model, images, out, (28, 28))
    assert result.resumed == 0
    check_whole(model, images, out)


def test_a_resumed_run_continues(model, tmp_path) -> None:
    images, out = photos(tmp_path / "in"), tmp_path / "out"
    interrupted(model, images, out)
    killed = tmp_path / "out.partial" / f".{'0' * 32}.safetensors.0.writing" / "files"
    killed.mkdir(parents=True)
    (killed / "half").write_bytes(b"of a run that was killed")
    assert extract(model, images, out, (28, 28)).resumed == 2
    check_whole(model, images, out)
    assert not (tmp_path / "out.partial").exists()


def test_other_weights_size_or_layers_do_not_mix(model, tmp_path) -> None:
    images, out = photos(tmp_path / "in"), tmp_path / "out"
    interrupted(model, images, out)
    other = InternViT(CONFIG).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.encoder.layers[1].mlp.fc2.bias[3] += 2**-20
    with pytest.raises(ValueError, match=r"other settings \(weights_digest was \w+, is \w+\)"):
        extract(other, images, out, (28, 28))
    with pytest.raises(ValueError, match=r"\(size was 28x28, is 28x42\)"):
        extract(model, images, out, (28, 42))
    with pytest.raises(ValueError, match=r"\(layers was last, is 0\)"):
        extract(model, images, out, (28, 28), layers=(0,))
    eps = InternViT(CONFIG.replace(layer_norm_eps=1e-5)).eval()
    eps.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"\(config\.layer_norm_eps was 1e-06, is 1e-05\)"):
        extract(eps, images, out, (28, 28))
    assert extract(model, images, out, (28, 28)).resumed == 2  # what was there is still good
    interrupted(model, images, tmp_path / "again")
    assert extract(other, images, tmp_path / "again", (28, 28), overwrite=True).resumed == 0
    check_whole(other, images, tmp_path / "again")


def test_an_image_replaced_by_one_of_the_same_size_and_time_counts_as_changed(model, tmp_path) -> None:
    images = [tmp_path / "in" / f"{i}.bmp" for i in range(3)]
    for i, path in enumerate(images):
        photo(path, i)
    before = images[0].stat()
    interrupted(model, images, tmp_path / "out")
    photo(images[0], 77)
    os.utime(images[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (images[0].stat().st_size, images[0].stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert extract(model, images, tmp_path / "out", (28, 28)).resumed == 1
    check_whole(model, images, tmp_path / "out")


def test_parts_under_another_images_name_are_not_taken(model, tmp_path) -> None:
    images, out = photos(tmp_path / "in", 2), tmp_path / "out"
    folder = interrupted(model, images, out, after=1)
    (part,) = folder.glob("*.safetensors")
    shutil.copy(part, parts.Parts(folder).place(images[1]))
    extract(model, images, out, (28, 28))
    check_whole(model, images, out)


def test_a_folder_of_somebody_else_stays(model, tmp_path) -> None:
    images = photos(tmp_path / "in", 2)
    theirs = tmp_path / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"out\.partial: not parts of an interrupted run"):
        extract(model, images, tmp_path / "out", (28, 28), overwrite=True)
    assert (theirs / "thesis.txt").read_text() == "precious"
    (theirs / "run.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"run\.json: not written by an extraction"):
        extract(model, images, tmp_path / "out", (28, 28), overwrite=True)
    (tmp_path / "link.partial").symlink_to(theirs)
    (tmp_path / "file.partial").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(ValueError, match=rf"{name}\.partial: expected a folder, or nothing"):
            extract(model, images, tmp_path / name, (28, 28))


def test_other_files_in_the_folder_of_parts_stay(model, tmp_path, caplog) -> None:
    images = photos(tmp_path / "in")
    folder = interrupted(model, images, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    extract(model, images, tmp_path / "out", (28, 28))
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
    assert "it holds other files" in caplog.text


def test_planted_links_are_not_followed(model, tmp_path) -> None:
    from internvit.data.pca import draw_pca

    images = photos(tmp_path / "in", 1)
    (tmp_path / "precious").write_text("precious")
    for name in ("out", "out.png"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
        (tmp_path / f"{name}.writing").symlink_to(tmp_path / "precious")
    extract(model, images, tmp_path / "out", (28, 28), overwrite=True)
    draw_pca(tmp_path / "out.png", tmp_path / "out", images, (28, 28), 14)
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "out").is_symlink()
    assert Image.open(tmp_path / "out.png").size[0] > 300


def test_outputs_that_are_there_or_are_inputs_stay(model, tmp_path, capsys) -> None:
    model.save_pretrained(tmp_path / "weights")
    (image,) = photos(tmp_path / "in", 1)
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    content = image.read_bytes()
    link = tmp_path / "link.safetensors"
    link.hardlink_to(image)

    def refused(*call: object) -> str:
        with pytest.raises(SystemExit) as done:
            internvit.cli.app.run([str(a) for a in ("features", image, "--weights", tmp_path / "weights", *call)])
        assert done.value.code == 2
        return " ".join(capsys.readouterr()[1].split())

    assert "is one of the images" in refused("--out", link, "--overwrite")
    assert "exists" in refused("--out", tmp_path / "dangling.safetensors")
    assert "for both" in refused("--out", tmp_path / "same.safetensors", "--pca", tmp_path / "same.safetensors")
    assert "expected a suffix among" in refused("--out", tmp_path / "o.safetensors", "--pca", tmp_path / "picture.docx")
    assert "'foo' cannot be used here" in refused("--out", tmp_path / "o.safetensors", "--device", "foo")
    if not torch.cuda.is_available():
        assert "'cuda' cannot be used here" in refused("--out", tmp_path / "o.safetensors", "--device", "cuda")
    assert image.read_bytes() == content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling.safetensors", "in", "link.safetensors", "weights"]


def test_a_file_that_appears_during_the_run_stays(model, tmp_path) -> None:
    images, out = photos(tmp_path / "in", 2), tmp_path / "out"

    def progress(waiting, total):
        out.write_text("mine")
        return waiting

    with pytest.raises(FileExistsError):
        extract(model, images, out, (28, 28), progress=progress)
    assert out.read_text() == "mine"
    assert extract(model, images, out, (28, 28), overwrite=True).resumed == 2


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_of_the_umask(model, tmp_path, umask) -> None:
    previous = os.umask(umask)
    try:
        extract(model, photos(tmp_path / "in", 1), tmp_path / "out", (28, 28))
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~umask


def test_two_runs_into_one_file(model, tmp_path) -> None:
    images = photos(tmp_path / "in", 2)
    messages = []

    def progress(waiting, total):
        def second() -> None:
            try:
                extract(model, images, tmp_path / "out", (28, 28))
            except ValueError as error:
                messages.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return waiting

    extract(model, images, tmp_path / "out", (28, 28), progress=progress)
    assert len(messages) == 1
    assert "another process is writing there" in messages[0]
    check_whole(model, images, tmp_path / "out")


JOIN = """
import sys
from pathlib import Path
import torch
from internvit.data.parts import open_parts
out, images = Path(sys.argv[1]), [Path(f"{i}.png") for i in range(24)]
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
with open_parts(out, {}) as parts:
    for i, image in enumerate(images):
        parts.write(image, "0", {f"{image}:last": torch.full((1024, 4096), float(i))})
    before = peak()
    parts.join(images, out, {"who": "me"})
    print(peak() - before)
    parts.remove()
"""


@pytest.mark.sampled(2)  # 6 s
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_joining_holds_no_more_than_a_copy_buffer(tmp_path) -> None:
    """24 parts of 16 MiB; the peak may not grow by one of them. ru_maxrss would begin at the peak of this process."""
    call = [sys.executable, "-c", JOIN, str(tmp_path / "out")]
    done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16 * 1024
    with safe_open(tmp_path / "out", framework="pt") as file:
        assert file.metadata() == {"who": "me"}
        for i in range(24):
            assert (file.get_tensor(f"{i}.png:last") == i).all()


@pytest.mark.parametrize("names", [["a"], ["a", "b", "c"], ["ü:0", 'quo"te', "back\\slash", "new\nline"]])
def test_joined_files_are_those_that_were_written(names, tmp_path, generator) -> None:
    images = [Path(name) for name in names]
    expected = {}
    with parts.open_parts(tmp_path / "out", {}) as folder:
        for i, image in enumerate(images):
            tensors = {
                f"{image}:{j}": torch.randn(3 * i + j, 5, generator=generator).to(dtype)
                for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
            }
            folder.write(image, "0", tensors)
            expected |= tensors
        folder.join(images, tmp_path / "out", {})
    joined = load_file(tmp_path / "out")
    assert joined.keys() == expected.keys()
    assert all(torch.equal(joined[name], expected[name]) for name in expected)


def test_a_lock_is_refused_to_the_second_and_given_after_the_first(tmp_path) -> None:
    for _ in range(2):
        with locked(tmp_path, wait=False):
            with pytest.raises(ValueError, match="another process is writing there"), locked(tmp_path, wait=False):
                pass
            with pytest.raises(ValueError, match="another process"), locked(tmp_path, shared=True, wait=False):
                pass
    with locked(tmp_path, shared=True), locked(tmp_path, shared=True, wait=False):
        pass


def test_too_many_images_are_refused_before_the_first(model, tmp_path) -> None:
    with pytest.raises(ValueError, match="too many for one safetensors file"):
        extract(model, [Path("x" * 200)] * 400_000, tmp_path / "out", (28, 28))
    with pytest.raises(ValueError, match="each once"):
        extract(model, [], tmp_path / "out", (28, 28), layers=(0, 0))
