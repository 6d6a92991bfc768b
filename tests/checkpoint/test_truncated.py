"""A checkpoint that another process truncates while it is read."""

import os
import subprocess
import sys

import pytest

from internvit.checkpoint.save import save_pretrained
from tests.checkpoint.models import PLAIN, make_model

CUT_SHORT = """
import os, sys
from internvit.checkpoint import load
from internvit.model.vit import InternViT

path, real, copies = sys.argv[1], load._copy, []

def copy(*arguments):
    copies.append(arguments)
    if len(copies) == int(sys.argv[2]):
        os.system(f"truncate -s {sys.argv[3]} {path}")
    return real(*arguments)

load._copy = copy
try:
    load.load_pretrained(InternViT, path)
except ValueError as error:
    print(error)
"""


@pytest.mark.sampled(6)
@pytest.mark.skipif(os.name != "posix", reason="runs truncate(1)")
@pytest.mark.parametrize(("copies", "size"), [(1, 0), (1, 5000), (4, 100_000)])
def test_a_file_truncated_in_place_while_it_is_read(tmp_path, copies: int, size: int) -> None:
    """By another process; a mapped file would end the reader by SIGBUS."""
    save_pretrained(make_model(PLAIN), tmp_path)
    path = tmp_path / "model.safetensors"
    command = [sys.executable, "-c", CUT_SHORT, str(path), str(copies), str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.startswith(f"{path}: was cut short while it was read")
