"""Whole models, trained and optimised, launch kernels that compile; no GPU is needed."""

import os
import subprocess
import sys

from tests.support import ROOT


def test_every_launch_of_a_model_compiles() -> None:
    """In a process of its own: the driver that launches nothing serves a whole process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.proofs.triton.compile_models", "sm_90"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-2000:]}"
    assert len(lines) == 22
    assert all(line.startswith("ok ") for line in lines)
