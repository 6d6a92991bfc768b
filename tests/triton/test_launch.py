"""Launch choices: rules by shape and target, measured files before rules, recording instead of running."""

import json

import pytest
import torch
from torch import Tensor

from internvit.kernels import ceilings, launch
from internvit.kernels.attention_launch import AttentionLaunch
from internvit.kernels.launch import TARGETS
from internvit.kernels.rows import RowLaunch, persistent_programs, row_launch
from internvit.ops.backends import implementation


def test_row_rule_holds_whole_rows():
    for channels in (1, 40, 384, 1024, 3200, 8192):
        choice = RowLaunch.rule(channels)
        assert choice.rows >= 1
        assert choice.warps in (1, 2, 4, 8, 16)
    assert RowLaunch.rule(1024).rows > 1


def test_persistent_programs_are_at_most_two_per_multiprocessor():
    choice, target = RowLaunch.rule(3200), TARGETS["sm_90"]
    assert persistent_programs(0, choice, target) == 0
    assert persistent_programs(5, choice, target) == 5
    assert persistent_programs(100_000, choice, target) == 264


def test_a_measured_file_goes_before_the_rule(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    target = TARGETS["sm_90"]
    path, _ = launch.tuned_files(target)
    path.parent.mkdir()
    path.write_text(json.dumps({"choices": {"rms_norm": {"C=1024": {"rows": 1, "warps": 2}}}}))
    for cached in (launch._tuned, row_launch):
        cached.cache_clear()
    try:
        assert row_launch("rms_norm", 1024, target) == RowLaunch(1, 2)
        assert row_launch("layer_norm", 1024, target) == RowLaunch.rule(1024)
        assert row_launch("rms_norm", 1024, TARGETS["sm_80"]) == RowLaunch.rule(1024)
    finally:
        for cached in (launch._tuned, row_launch):
            cached.cache_clear()


@pytest.mark.parametrize("arch", TARGETS)
def test_attention_rule_is_made_for_each_target(arch):
    for kernel in ("forward", "grad_q", "grad_kv", "delta"):
        for block_d in (16, 64, 128):
            for itemsize in (2, 4):
                choice = AttentionLaunch.rule(kernel, block_d, itemsize, TARGETS[arch])
                assert choice.rows % 16 == 0
                assert choice.columns % 16 == 0


def test_recorded_launches_run_nothing():
    x, weight = (torch.empty(s, device="meta", dtype=torch.bfloat16) for s in ((2, 1025, 1024), (1024,)))
    with launch.record(TARGETS["gfx942"]) as launches:
        implementation("rms_norm", "triton")(x, weight, 1e-6, "fused")
    assert [one.kernel.fn.__name__ for one in launches] == ["norm_kernel"]
    assert all(a.device.type == "meta" for a in launches[0].args if isinstance(a, Tensor))


def test_ceilings():
    h100 = ceilings.CEILINGS[1]
    bytes_moved, flops = ceilings.work("layer_scale_residual_norm", 8, 25, 128)
    assert bytes_moved == 4 * 8 * 1025 * 3200 * 2
    assert flops == 0
    assert h100.seconds(3.35e12, 0) == 1
    assert h100.seconds(0, 989.4e12) == 1
