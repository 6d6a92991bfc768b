"""How setup.py decides about internvit_cuda: by nvcc and torch, never by a device; a failure is one line."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.support.building import setup_module

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@pytest.fixture
def build(monkeypatch):
    """setup.py, with no variable set that changes what it does."""
    for name in ("INTERNVIT_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    return setup_module()


def test_switched_off(build, monkeypatch) -> None:
    monkeypatch.setenv("INTERNVIT_CUDA", "0")
    with pytest.raises(build.MissingError, match="INTERNVIT_CUDA=0"):
        build.cuda_plan()


def test_without_nvcc(build, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(shutil, "which", lambda *args, **kwargs: None)
    with pytest.raises(build.MissingError, match="no nvcc here; install the CUDA toolkit, or set CUDA_HOME"):
        build.cuda_plan()


@needs_nvcc
def test_torch_of_another_cuda(build, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.MissingError, match="built without CUDA"):
        build.cuda_plan()
    monkeypatch.setattr(torch.version, "cuda", "11.8")
    with pytest.raises(build.MissingError, match=r"torch of CUDA 11\.8"):
        build.cuda_plan()


@needs_nvcc
def test_the_toolkit_is_asked_for_its_folders(build) -> None:
    includes, libraries = build.toolkit_folders(shutil.which("nvcc"))
    assert any((Path(p) / "cuda_runtime_api.h").exists() for p in includes)
    assert any((Path(p) / "libcudart.so").exists() for p in libraries)


@needs_nvcc
def test_architectures(build, monkeypatch) -> None:
    def targets():
        return [flag.rpartition("code=")[2] for flag in build.architecture_flags(shutil.which("nvcc"))]

    assert targets() == ["sm_80", "sm_90", "sm_100", "compute_100"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert targets() == ["sm_86", "sm_90a", "compute_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(RuntimeError, match=r"expected numbers as '8\.0;9\.0\+PTX', got 'Hopper'"):
        targets()


@needs_nvcc
def test_the_plan_compiles_with_warnings_as_errors(build) -> None:
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    plan = build.cuda_plan()
    assert len(plan.compiles) == 6
    for source, command in plan.compiles.items():
        text = " ".join(command)
        assert "-Werror" in text, source
        assert ("all-warnings" in text) == (source.suffix == ".cu")


def test_jobs(build, monkeypatch) -> None:
    assert 1 <= int(build.jobs()) <= 1024
    monkeypatch.setenv("MAX_JOBS", "7")
    assert build.jobs() == "7"


def test_a_failure_is_logged_and_stops_nothing(build, monkeypatch, caplog) -> None:
    from setuptools.dist import Distribution

    def fails():
        raise RuntimeError("unit_float32.cu: error: nothing works\nmore")

    monkeypatch.setitem(build.PLANS, "internvit_cuda", fails)
    command = build.BuildLibraries(Distribution())
    command.build_temp = "nowhere"
    with caplog.at_level("INFO", logger="internvit.build"):
        command.build_extension(build.Extension("internvit.lib.internvit_cuda", sources=[]))
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        "internvit_cuda is not built, its ops run on other backends: unit_float32.cu: error: nothing works"
    ]
