"""The benchmark of host time runs without a GPU, for every op, and starts no kernel."""

import json
import subprocess
import sys

import pytest

from internvit.benchmarks.reports import host_time
from internvit.ops.core.spec import SPECS
from tests.support import ROOT

triton = pytest.importorskip("triton")


def run(*arguments):
    """In a process of its own: afterwards `triton` takes CPU tensors in it."""
    command = [sys.executable, "-m", "internvit.benchmarks.reports.host_time", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.sampled(2)
def test_rows_of_a_norm_and_of_attention(tmp_path):
    out = tmp_path / "host.json"
    done = run("--only", "layer_norm,qk_norm_attention", "--rounds", "1", "--calls", "3", "--json", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(out.read_text())["rows"]
    found = {(row["op"], row["candidate"], row["mode"]) for row in rows}
    for op in ("layer_norm", "qk_norm_attention"):
        for candidate in ("torch", "cpu", "triton"):
            for mode in (host_time.FORWARD, host_time.BOTH):
                assert (op, candidate, mode) in found
    assert ("layer_norm", "raw cpu", host_time.FORWARD) in found
    assert ("qk_norm_attention", "raw cpu", host_time.FORWARD) not in found, "the library has no such op"
    assert all(row["us"] > 0 for row in rows)


@pytest.mark.slow
def test_every_op(tmp_path):
    out = tmp_path / "host.json"
    done = run("--rounds", "1", "--calls", "1", "--json", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    assert {row["op"] for row in json.loads(out.read_text())["rows"]} == set(SPECS)


def test_unknown_ops_are_named(capsys):
    with pytest.raises(SystemExit):
        host_time.main(["--only", "softmax"])
    assert "--only: expected some of" in capsys.readouterr().err
