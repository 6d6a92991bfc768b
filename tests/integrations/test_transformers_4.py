"""Patching under transformers 4.57, in an environment of its own (`make test-all`)."""

import os
import subprocess
import sys

import pytest

from tests.support import ROOT

WHEELS = ["transformers==4.57.1", "huggingface_hub<1", "tokenizers>=0.22,<0.23"]
BESIDE = ["requests", "urllib3", "certifi", "charset-normalizer", "idna", "filelock"]
SELECTED = "(hf or transformers or internvl or auto or saves) and not true_widths"


@pytest.mark.slow
def test_with_transformers_4_57(tmp_path) -> None:
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), *WHEELS, *BESIDE]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"pip cannot install transformers 4.57.1: {installed.stderr.strip()[-200:]}")
    root = ROOT
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    version = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(version, capture_output=True, text=True, env=environment, cwd=root)
    assert found.stdout.strip() == "4.57.1", found.stderr
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "tests/integrations/test_transformers.py",
        "tests/integrations/test_transformers_backbone.py",
        "tests/upstream/test_patch.py",
        "-q",
        "-m",
        "not slow",
    ]
    run = subprocess.run([*tests, "-k", SELECTED], capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
