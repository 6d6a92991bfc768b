"""Other versions of Triton compile every kernel for every target as well: fetched by pip, in processes of their own."""

import json
import os
import subprocess
import sys

import pytest

from internvit.kernels.tools.static_profile import failures
from tests.support import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_compiles(version, tmp_path):
    folder = tmp_path / "triton"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    fetched = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True, check=False)
    if fetched.returncode:
        pytest.skip(f"pip cannot fetch triton {version}: {fetched.stderr.strip().splitlines()[-1]}")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }
    rows = tmp_path / "rows.json"
    profile = [sys.executable, "-m", "internvit.kernels.tools.static_profile", "--json", str(rows)]
    subprocess.run(profile, env=environment, check=True, capture_output=True)
    found = [failure for row in json.loads(rows.read_text()) for failure in failures(row)]
    assert not found, f"triton {version}: " + "\n".join(found)
