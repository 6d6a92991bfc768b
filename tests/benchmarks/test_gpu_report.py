"""The GPU report's whole path without a GPU: counted, rehearsed, stopped, resumed, and put into one file."""

import dataclasses
import json
import tarfile

import pytest
import torch

from internvit.benchmarks.harness.cases import MissingPeerError, Setting
from internvit.benchmarks.harness.peers import sdpa, triton_tutorial
from internvit.benchmarks.ops import bench_attention
from internvit.benchmarks.reports import gpu_report, gpu_smoke
from internvit.benchmarks.reports.gpu_report import Stage
from tests.support import ROOT


def stage(name, code, seconds=0.0, **changes):
    """A stage that runs a piece of Python, by way of the standard library's `timeit`."""
    return Stage(name, 0.5, lambda run: ["timeit", "-n", "1", "-r", "1", code], seconds, 0.0, **changes)


def outcomes(folder):
    return {s["stage"]: s["outcome"] for s in json.loads((folder / "report.json").read_text())["stages"]}


def test_without_a_gpu_it_does_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main(["--out", str(tmp_path / "none")]) == 0
    assert "no GPU here" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


FILES = {"tune": {"tune.json"}, "bench": {"bench.csv", "bench.json"}}
TURNS = (("compile",), ("smoke", "tests"), ("tune",), ("bench",))
"""Of the rehearsal: counting and running the small forms of all stages takes a core's minute."""


def rehearse(stages, folder, capsys):
    """Counts the stages and runs their small forms."""
    pytest.importorskip("triton")
    code = gpu_report.main(["--rehearse", "--stages", ",".join(stages), "--out", str(folder)])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert outcomes(folder) == dict.fromkeys(stages, "ok")
    assert all(f"{name}: " in printed for name in stages)
    names = {"report.json", *(f"{name}.log" for name in stages)}.union(*(FILES.get(name, ()) for name in stages))
    with tarfile.open(folder / "report.tar") as tar:
        assert names <= set(tar.getnames())
    if "tune" in stages:
        assert (folder / "cache/internvit/sm_90.json").is_file(), "the benchmarks run with what was tuned"
    if "tests" in stages:
        # The GPU's tests must be found without the packages of the development extra: only torch, Triton and pytest.
        collected = {line.split("::")[0] for line in (folder / "tests.log").read_text().splitlines() if "::" in line}
        assert collected <= {str(p.relative_to(ROOT)) for p in (ROOT / "tests").rglob("test_gpu*.py")}


@pytest.mark.sampled(4)
def test_every_stage_fits_and_runs_in_its_small_form(tmp_path, capsys, pytestconfig):
    """A part of them in every second run, by its seed."""
    assert {name for turn in TURNS for name in turn} == {one.name for one in gpu_report.STAGES}
    rehearse(TURNS[pytestconfig.option.seed // 2 % len(TURNS)], tmp_path, capsys)


@pytest.mark.slow
def test_the_whole_report(tmp_path, capsys):
    rehearse([one.name for one in gpu_report.STAGES], tmp_path, capsys)


def test_shares_add_up_to_one():
    assert sum(one.share for one in gpu_report.STAGES) == pytest.approx(1)


@pytest.mark.sampled(4)  # 6 s
def test_a_stage_that_would_overrun_by_count_fails(tmp_path, capsys, monkeypatch):
    smoke = next(one for one in gpu_report.STAGES if one.name == "smoke")
    monkeypatch.setattr(gpu_report, "STAGES", (dataclasses.replace(smoke, each=smoke.each * 10),))
    assert gpu_report.main(["--rehearse", "--out", str(tmp_path)]) == 1
    assert "does not fit: smoke would take 330 s of 51 s" in capsys.readouterr().out


def test_a_stage_that_is_stopped_keeps_its_log_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "CORES", 1)
    slow = stage("bench", "import time; print('begun', flush=True); time.sleep(60)")
    monkeypatch.setattr(gpu_report, "STAGES", (slow, stage("tests", "print('ran')")))
    assert gpu_report.main(["--rehearse", "--minutes", "0.1", "--out", str(tmp_path)]) == 0
    assert outcomes(tmp_path) == {"bench": "stopped after 3 s", "tests": "ok"}
    with tarfile.open(tmp_path / "report.tar") as tar:
        assert b"begun" in tar.extractfile("bench.log").read()


def test_half_a_smoke_test_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "CORES", 1)
    monkeypatch.setattr(gpu_report, "STAGES", (stage("smoke", "import time; time.sleep(60)"), stage("bench", "1")))
    assert gpu_report.main(["--rehearse", "--minutes", "0.05", "--out", str(tmp_path)]) == 1


def test_a_second_run_goes_on_where_the_first_ended(tmp_path, capsys, monkeypatch):
    mark = tmp_path / "ran"
    monkeypatch.setattr(
        gpu_report,
        "STAGES",
        (stage("smoke", f"open({str(mark)!r}, 'a').write('x')"), stage("tests", "raise ValueError")),
    )
    arguments = ["--rehearse", "--out", str(tmp_path / "report")]
    for _ in range(2):
        assert gpu_report.main(arguments) == 1
    assert mark.read_text() == "x"
    assert "smoke: ok before" in capsys.readouterr().out
    assert outcomes(tmp_path / "report") == {"smoke": "ok", "tests": "exit status 1"}
    gpu_report.main([*arguments, "--again"])
    assert mark.read_text() == "xx"
    report = tmp_path / "report/report.json"
    report.write_text(json.dumps({**json.loads(report.read_text()), "sources": "another"}))
    gpu_report.main(arguments)
    assert mark.read_text() == "xxx", "what other code did is done anew"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages", "smoke,fly"], "--stages: expected some of compile, smoke"),
        (["--only", "softmax"], "--only: expected some of attention, "),
        (["--minutes", "0"], "--minutes must be more than 0, got 0"),
        (["--triton-tutorial", "missing.py"], "missing.py is no file"),
    ],
)
def test_wrong_arguments_are_named(arguments, says, capsys):
    with pytest.raises(SystemExit):
        gpu_report.main(arguments)
    assert says in capsys.readouterr().err


def test_the_tutorial_reaches_its_peer(tmp_path, monkeypatch):
    """A stand-in with the tutorial's signature; its kernel itself needs a GPU."""
    tutorial = tmp_path / "06-fused-attention.py"
    code = """
from torch.nn.functional import scaled_dot_product_attention
def attention(q, k, v, causal, sm_scale):
    assert q.is_contiguous() and not causal
    return scaled_dot_product_attention(q, k, v, scale=sm_scale)
"""
    tutorial.write_text(code)
    asked = gpu_report.parse(["--triton-tutorial", str(tutorial)])
    command = gpu_report._bench(gpu_report.Run(tmp_path, "sm_90", "", False, asked.triton_tutorial, 60.0))
    assert command[-2:] == ["--triton-tutorial", str(tutorial)]
    setting = Setting("cuda", dtypes=(torch.bfloat16,), triton_tutorial=tutorial)
    case = next(case for case in bench_attention.cases(setting) if "heads apart" in case.shape)
    assert case.dtype == torch.float16
    assert case.modes == ("forward",)
    assert (case.sizes["tokens"], case.sizes["batch"]) == (1024, 8)
    (build,) = (one.build for one in case.implementations if one.name == "Triton's tutorial")
    q, k, v = (torch.randn(2, 5, 3, 16) for _ in range(3))
    torch.testing.assert_close(build()(q, k, v), sdpa(q, k, v))
    for path, says in ((None, "--triton-tutorial PATH"), (tmp_path / "gone.py", "is no Python file")):
        with pytest.raises(MissingPeerError, match=says):
            triton_tutorial(dataclasses.replace(setting, triton_tutorial=path))["Triton's tutorial"]()


def test_smoke_sees_a_wrong_model(monkeypatch, capsys):
    init = gpu_smoke.Smoke.__init__

    def broken(self, *args):
        init(self, *args)
        self.model.encoder.layers[0].norm1.eps = 0.3

    monkeypatch.setattr(gpu_smoke.Smoke, "__init__", broken)
    assert gpu_smoke.main(["--device", "cpu"]) == 1
    assert "0 of 6 right; wrong: internvit-300m-448px, eval" in capsys.readouterr().out
