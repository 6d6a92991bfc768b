"""Launch choices: rules by shape and target, measured files before rules, recording instead of running."""

import json
import re
from pathlib import Path

import pytest
import torch
import triton
from torch import Tensor

from internvit.kernels.attention.config import AttentionConfig
from internvit.kernels.common import config as configs
from internvit.kernels.common import launch
from internvit.kernels.common.rows import RowConfig, persistent_programs, row_config
from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools import tune
from internvit.kernels.tools.static_profile import resident_programs
from internvit.ops.backends.registry import implementation
from tests.support.implementations import call

BUDGET = Path(__file__).with_name("budget.json")


def test_row_rule_holds_whole_rows():
    for channels in (1, 40, 384, 1024, 3200, 8192):
        choice = RowConfig.rule(channels)
        assert choice.rows >= 1
        assert choice.warps in (1, 2, 4, 8, 16)
    assert RowConfig.rule(1024).rows > 1


def test_persistent_programs_are_those_that_a_gpu_holds():
    choice, target = RowConfig.rule(3200), TARGETS["sm_90"]
    assert persistent_programs(0, choice, target) == 0
    assert persistent_programs(5, choice, target) == 5
    assert persistent_programs(100_000, choice, target) == 2 * 132
    assert persistent_programs(2 * 3960, RowConfig.rule(1024), target) == 3 * 132
    assert persistent_programs(1025, RowConfig.rule(1024), target) == 257
    assert persistent_programs(7 * 132, RowConfig.rule(8192), target) == 132


def test_persistent_programs_have_room_in_what_was_compiled():
    """By the committed registers and shared memory of each kernel that sums over rows; one more program of the fused
    backward may fit, not two."""
    compiled = 0
    for key, (registers, shared, *_) in json.loads(BUDGET.read_text())["rows"].items():
        found = re.match(
            r"(\w+) (\w*norm_backward|layer_scale_residual_backward)_kernel: .* C=(\d+) .*warps=(\d+)", key
        )
        if found is None:
            continue
        target, channels, warps = TARGETS[found[1]], int(found[3]), int(found[4])
        assert RowConfig.rule(channels).warps == warps
        started = -(-persistent_programs(10**9, RowConfig.rule(channels), target) // target.multiprocessors)
        held = resident_programs(target, registers, shared, warps)
        assert started <= held, key
        if "layer_scale_residual_norm" in found[2]:
            assert held - started <= 1, key
        compiled += 1
    assert compiled > 50


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    """Where sm_90's measured choices lie in a user's cache directory of this test's own; nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path, _ = configs.tuned_files(TARGETS["sm_90"])
    for cached in (configs._tuned, row_config):
        cached.cache_clear()
    yield path
    for cached in (configs._tuned, row_config):
        cached.cache_clear()


MEASURED = {"layer_scale_residual_norm": {"C=1024": {"rows": 1, "warps": 2}}}


def test_a_measured_file_goes_before_the_rule(tuned_file):
    tune.write(tuned_file, MEASURED, device="a test")
    assert json.loads(tuned_file.read_text())["device"] == "a test"
    target = TARGETS["sm_90"]
    assert row_config("rms_norm", 1024, target) == RowConfig(1, 2)
    assert row_config("qk_norm", 1024, target) == RowConfig.rule(1024)
    assert row_config("rms_norm_backward", 1024, target) == RowConfig.rule(1024)
    assert row_config("rms_norm", 1024, TARGETS["sm_80"]) == RowConfig.rule(1024)


@pytest.mark.parametrize("backward", ["", "_backward"])
def test_the_fused_op_and_its_parts_take_one_measured_choice(tuned_file, backward):
    """With choices of their own they added a row's squares in different orders."""
    own = {
        "rms_norm": (2, 4),
        "layer_norm": (4, 4),
        "layer_scale_residual": (2, 8),
        "layer_scale_residual_norm": (1, 8),
    }
    choices = {f"{op}{backward}": {"C=1024": dict(rows=r, warps=w)} for op, (r, w) in own.items()}
    tune.write(tuned_file, choices)
    assert {row_config(kernel, 1024, TARGETS["sm_90"]) for kernel in choices} == {RowConfig(1, 8)}


def test_the_users_file_goes_before_the_packages(tuned_file, tmp_path, monkeypatch):
    shipped = tmp_path / "package" / "sm_90.json"
    monkeypatch.setattr(configs, "tuned_files", lambda target: (tuned_file, shipped))
    measured = {"C=1024": {"rows": 4, "warps": 4}, "C=3200": {"rows": 1, "warps": 4}}
    tune.write(shipped, {"layer_scale_residual_norm": measured})
    tune.write(tuned_file, MEASURED)
    assert row_config("rms_norm", 1024, TARGETS["sm_90"]) == RowConfig(1, 2)
    assert row_config("rms_norm", 3200, TARGETS["sm_90"]) == RowConfig(1, 4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"configs": ',
        "[]",
        '{"kernels": {}}',
        '{"configs": {"qk_norm": 3}}',
        '{"configs": {"qk_norm": {"C=1024": {"rows": "two", "warps": 2}}}}',
        '{"configs": {"qk_norm": {"C=1024": {"rows": 1, "warps": -2}}}}',
        '{"configs": {"qk_norm": {"C=1024": {"lines": 1}}}}',
    ],
)
def test_a_broken_file_is_ignored_with_a_warning(tuned_file, text):
    tuned_file.parent.mkdir()
    tuned_file.write_text(text)
    with pytest.warns(
        RuntimeWarning, match=r"rules are used instead; .* `python -m internvit.kernels.tools.tune --out FILE`"
    ):
        assert row_config("qk_norm", 1024, TARGETS["sm_90"]) == RowConfig.rule(1024)


def test_a_failed_write_leaves_the_old_file(tuned_file):
    tune.write(tuned_file, MEASURED)
    before = tuned_file.read_text()
    with pytest.raises(TypeError):
        tune.write(tuned_file, {"rms_norm": {"C=1024": object()}})
    assert tuned_file.read_text() == before
    assert list(tuned_file.parent.iterdir()) == [tuned_file]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "FOLDER"], "--out: expected a file, got the folder"),
        (["--out", "FOLDER/x.json", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["--out", "FOLDER/x.json"], "tune: no GPU is visible to torch"),
    ],
)
def test_tunes_arguments(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["tune", *(a.replace("FOLDER", str(tmp_path)) for a in arguments)])
    with pytest.raises(SystemExit) as stopped:
        tune.main()
    assert stopped.value.code in (1, 2)
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arch", TARGETS)
def test_attention_rule_is_made_for_each_target(arch):
    for kernel in ("forward", "grad_q", "grad_kv", "delta"):
        for block_d in (16, 64, 128):
            for itemsize in (2, 4):
                choice = AttentionConfig.rule(kernel, block_d, itemsize, TARGETS[arch])
                assert choice.rows % 16 == 0
                assert choice.columns % 16 == 0


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(
    ("tokens", "peeled", "tail"), [(257, True, False), (1025, True, False), (1024, False, False), (1290, False, True)]
)
def test_the_class_token_takes_no_tile(arch, tokens, peeled, tail):
    """At 1 + whole tiles every attention kernel takes the first query and key apart, and masks no tile of its walk."""
    for heads, head_dim in ((25, 128), (16, 64)):
        q, k, v = torch.empty(1, tokens, 3, heads, head_dim, device="meta", dtype=torch.bfloat16).unbind(2)
        with launch.record(TARGETS[arch]) as launches:
            out, lse = call("attention", "triton", q, k, v, 0.125, *[None] * 4)
            call("attention_backward", "triton", out, q, k, v, out, lse, 0.125, *[None] * 4, q, k, v)
        walks = [one for one in launches if "TAIL" in one.constants]
        assert len(walks) == 3
        for one in walks:
            flags = {name: one.constants[name] for name in ("PEEL_QUERY", "PEEL_KEY", "TAIL")}
            assert flags == {"PEEL_QUERY": peeled, "PEEL_KEY": peeled, "TAIL": tail}, one.kernel.fn.__name__
            kept = one.constants["BLOCK_N" if "grad_kv" in one.kernel.fn.__name__ else "BLOCK_M"]
            assert one.grid == (triton.cdiv(tokens, kept) * heads,)


def test_recorded_launches_run_nothing():
    x, weight = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((2, 1025, 1024), (1024,)))
    with launch.record(TARGETS["gfx942"]) as launches:
        implementation("rms_norm", "triton")(x, weight, 1e-6, "fused")
    assert [one.kernel.fn.__name__ for one in launches] == ["norm_kernel"]
    assert all(a.device.type == "meta" for a in launches[0].args if isinstance(a, Tensor))
