"""`internvit.kernels.tools.tune` from its arguments to a file the package reads, with a clock that is not one."""

import json

import pytest
import torch

from internvit.kernels.attention.config import AttentionLaunch, attention_launch
from internvit.kernels.common import launch
from internvit.kernels.common.launch import INTERPRETER
from internvit.kernels.common.rows import RowLaunch, row_launch
from internvit.kernels.tools import tune

CACHED = (launch._tuned, row_launch, attention_launch)


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    """A small problem on the CPU, a few candidates, and a clock on which the last candidate is the fastest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name, value in {"DEVICE": "cpu", "MODELS": ((2, 16),), "BATCH": 1, "TOKENS": 18}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune, "row_candidates", lambda: iter([RowLaunch(2, 2), RowLaunch(4, 1)]))
    candidates = [AttentionLaunch(32, 16, 4, 1), AttentionLaunch(16, 32, 4, 2)]
    monkeypatch.setattr(tune, "attention_candidates", lambda: iter(candidates))
    monkeypatch.setattr(tune, "measure", lambda calls: {key: 1.0 - 0.1 * i for i, key in enumerate(calls)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the interpreter")
    for cached in CACHED:
        cached.cache_clear()
    yield launch.tuned_files(INTERPRETER)[0]
    for cached in CACHED:
        cached.cache_clear()


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tune", *map(str, arguments)])
    tune.main()


def test_what_tune_writes_is_what_the_kernels_take(rehearsal, monkeypatch, capsys):
    run(monkeypatch, "--out", rehearsal)
    for cached in CACHED:
        cached.cache_clear()
    written = json.loads(rehearsal.read_text())
    assert {"target", "device", "torch", "triton", "choices"} == set(written)
    assert len(written["choices"]) == 11  # three kernels of attention, eight over rows
    assert row_launch("layer_norm_backward", 32, INTERPRETER) == RowLaunch(4, 1)
    assert row_launch("layer_norm_backward", 64, INTERPRETER) == RowLaunch.rule(64)
    for kernel in ("forward", "grad_q", "grad_kv"):
        assert attention_launch(kernel, 16, torch.bfloat16, INTERPRETER) == AttentionLaunch(16, 32, 4, 2)
    assert "is not read from where it is" not in capsys.readouterr().out


def test_a_wrong_candidate_is_not_taken_and_a_file_elsewhere_is_pointed_out(rehearsal, tmp_path, monkeypatch, capsys):
    problems = tune.row_problems

    def wrong(channels, dtype):
        call = problems(channels, dtype)["rms_norm"]

        def run():  # as if the kernel were broken for tiles of four rows
            y, rstd = call()
            return (y + (row_launch("rms_norm", channels, INTERPRETER).rows == 4), rstd)

        return {"rms_norm": run}

    monkeypatch.setattr(tune, "row_problems", wrong)
    run(monkeypatch, "--out", tmp_path / "elsewhere.json", "--only", "rms_norm")
    choices = json.loads((tmp_path / "elsewhere.json").read_text())["choices"]
    assert choices == {"rms_norm": {"C=32": {"rows": 2, "warps": 2}}}
    assert f"put it at {rehearsal}" in capsys.readouterr().out


def test_two_percent_are_needed(rehearsal, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda calls: {key: 1.0 - 0.005 * i for i, key in enumerate(calls)})
    run(monkeypatch, "--out", rehearsal, "--only", "layer_norm")
    assert json.loads(rehearsal.read_text())["choices"] == {}
