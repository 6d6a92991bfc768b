"""The suite for people without the checkout passes here, and a broken kernel makes it fail."""

import json

import pytest
import torch

import internvit.cli.app
from internvit.cli import selfcheck as check
from internvit.ops.backends import registry
from internvit.ops.core.spec import every_spec


def test_a_sound_machine_passes_and_prints_a_table(capsys, monkeypatch, seed: int) -> None:
    every = list(check.checks(quick=True, seed=seed))
    assert every_spec().keys() <= {what.partition(",")[0] for what, *_ in every}
    some = [c for c in every if "6b" not in c[0]][seed % 64 :: 64]
    monkeypatch.setattr(check, "checks", lambda *_: iter(some))
    with pytest.raises(SystemExit) as exit_info:
        internvit.cli.app.run(["check", "--quick"])
    stdout = capsys.readouterr().out
    assert exit_info.value.code == 0, stdout
    assert f"{len(some)} passed, 0 failed" in stdout


@pytest.mark.slow
def test_every_quick_check_passes(seed: int) -> None:
    assert [result for result in check.run(quick=True, seed=seed) if not result.passed] == []


def test_a_broken_kernel_is_found(capsys, monkeypatch) -> None:
    def broken(x, weight, eps, rounding):
        y, _, rstd = registry.implementation("layer_norm", "reference")(x, weight, None, eps)
        return y, rstd

    monkeypatch.setitem(registry._IMPLEMENTATIONS, ("rms_norm", "reference"), broken)
    some = [c for c in check.checks(quick=True) if c[0].startswith("rms_norm") and c[1] == "reference"][:2]
    monkeypatch.setattr(check, "checks", lambda *_: iter(some))
    with pytest.raises(SystemExit) as exit_info:
        internvit.cli.app.run(["check", "--quick", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert exit_info.value.code == 1
    assert all(row["failures"] for row in rows)


@pytest.mark.sampled(2)  # 5 s
def test_the_errors_shown_are_those_of_numbers(seed: int) -> None:
    """The sums of LayerNorm's folded weights are 0: fold_norm's column said 9.4e+11 for what rounds to that."""
    every = [c for c in check.checks(quick=True, seed=seed) if c[0].startswith("fold_norm") and "layer_norm" in c[0]]
    *_, run = every[seed % len(every)]
    violations, error = run()
    assert violations == []
    assert error < 0.02


def test_an_exception_is_a_failure_of_that_check_alone(monkeypatch) -> None:
    def explode():
        raise RuntimeError("no kernel image")

    sound = next(iter(check.checks(quick=True)))
    monkeypatch.setattr(check, "checks", lambda *_: iter([("op", "b", "float32", "1", explode), sound]))
    results = list(check.run())
    assert [r.passed for r in results] == [False, True]
    assert results[0].failures == ("RuntimeError: no kernel image",)
    assert torch.isnan(torch.tensor(results[0].error))
