"""A package that calls this library's kernels, run by a C++ program in which there is no Python."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from internvit.export import export_model
from internvit.export.targets import TARGETS
from internvit.model.vit import InternViT
from internvit.ops.backends import native
from tests.support import ROOT
from tests.support.models import CONFIGS, random_weights

CONFIG = CONFIGS["tiny-rms_norm"].replace(num_hidden_layers=2)
SOURCE = ROOT / "examples" / "cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """examples/cpp, built as docs/export.md says."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake here")
    folder = tmp_path_factory.mktemp("cmake")
    torch_folder = f"-DTORCH={torch.__path__[0]}"
    for command in (["cmake", "-S", SOURCE, "-B", folder, torch_folder], ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "internvit_features"


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    reason = native.unavailable_reason("internvit_cpu")
    if reason is not None:
        pytest.skip(reason)
    model = InternViT(CONFIG).eval()
    random_weights(model)
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    return export_model(model, path, "aoti", backend="cpu", size="dynamic").paths[0]


@pytest.mark.slow  # compiles the package and the program
def test_cpp_has_pythons_bits(program: Path, package: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(package) as file:
        kernels = b"".join(file.read(name) for name in file.namelist() if name.endswith(".json"))
    for op in ("attention", "rms_norm", "gelu", "layer_scale_residual"):
        assert f"internvit_cpu::{op}".encode() in kernels
    pixels = torch.randn(3, 3, 70, 42)
    (tmp_path / "pixels.f32").write_bytes(pixels.numpy().tobytes())
    call = [program, package, native.FOLDER / "internvit_cpu.so", 70, 42, "pixels.f32", "features.f32"]
    done = subprocess.run([*map(str, call)], cwd=tmp_path, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert 'internvit.backend: "cpu"' in done.stdout
    expected = TARGETS["aoti"].run(package, pixels)[0]
    actual = np.fromfile(tmp_path / "features.f32", np.float32)
    assert np.array_equal(actual, expected.numpy().ravel())
    needed = ["ldd", program, native.FOLDER / "internvit_cpu.so"]
    libraries = subprocess.run(needed, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in libraries
    assert "libpython" not in libraries
    assert "libtorch_python" not in libraries
    done = subprocess.run([*map(str, call[:4]), "41", *call[5:]], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "HEIGHT and WIDTH must be multiples of 14\n")
    call[2] = tmp_path / "nowhere.so"
    assert subprocess.run([*map(str, call)], cwd=tmp_path, capture_output=True).returncode == 1
