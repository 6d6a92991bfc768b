"""examples/segmentation/train.py under torchrun: the steps of one process, resumed to the bit, and on other ranks."""

import contextlib
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.dense.test_segmentation_train import DIES_WRITING, command, environment, place, refused, same, train
from tests.support.ranks import run_ranks

assert place  # the fixture

STILL = ("--set", "model.drop_path_rate=0.0", "--set", "head.dropout=0.0")
"""Without random numbers, of which each rank has its own."""
FEWER = ("--set", "optim.steps=4", "--set", "run.evaluate_every=4")


def torchrun(ranks: int, call: list[str], script: Path | None = None) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    call = [str(script), *call] if script else call
    env = {**environment(), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run([*start, *call], capture_output=True, text=True, timeout=600, env=env)


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in csv.DictReader((out / "log.csv").open()) if row["loss"]]


def checkpoint(out: Path) -> dict:
    return torch.load(out / "checkpoint.pt", weights_only=True)


class StoppedError(Exception):
    """In place of a signal."""


def train_here(arguments: list[str]) -> None:
    train.main(arguments, standalone_mode=False)


def train_three_times(arguments: dict[str, list[str]]) -> None:
    """Undisturbed; stopped when it would write its second checkpoint, and resumed; stopped once more."""
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "RANK": str(dist.get_rank())}
    train_here(arguments["ranks"])
    write, written = train.write_checkpoint, []

    def write_once(path: Path, state: dict) -> None:
        if written:
            raise StoppedError
        written.append(path)
        write(path, state)

    for out in ("stopped", "fewer"):
        train.write_checkpoint = write_once
        written.clear()
        with pytest.raises(StoppedError) if dist.get_rank() == 0 else contextlib.nullcontext():
            train_here(arguments[out])
    train.write_checkpoint = write
    dist.barrier()
    train_here(arguments["stopped"])


@pytest.mark.sampled(2)  # 25 s
def test_two_ranks_continue_to_the_bit_and_one_goes_on(place) -> None:
    arguments = {out: command(place, f"here-{out}", *FEWER)[1:] for out in ("ranks", "stopped", "fewer")}
    run_ranks(2, train_three_times, arguments)
    whole, stopped, fewer = (place / f"here-{out}" for out in arguments)
    expected, ours = checkpoint(whole), checkpoint(stopped)
    assert len(expected["rng"]) == 2
    assert all(same(ours[name], expected[name]) for name in expected)
    assert (stopped / "log.csv").read_text() == (whole / "log.csv").read_text()
    assert checkpoint(fewer)["step"] == 2
    before = losses(fewer)[:2]
    train_here(arguments["fewer"])
    assert checkpoint(fewer)["step"] == 4
    assert losses(fewer)[:2] == before == losses(whole)[:2]


@pytest.mark.slow
def test_torchrun_continues_to_the_bit_and_one_process_continues_it(place, tmp_path) -> None:
    """Killed half-way through its second checkpoint; then by the same number of ranks, and by one."""
    script = tmp_path / "dies.py"
    script.write_text(DIES_WRITING.format(n=2))
    whole = torchrun(2, command(place, "ranks", *FEWER))
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("mIoU") == 1
    for out in ("ranks-killed", "ranks-fewer"):
        killed = torchrun(2, command(place, out, *FEWER), script)
        assert killed.returncode != 0
        assert checkpoint(place / out)["step"] == 2
    resumed = torchrun(2, command(place, "ranks-killed", *FEWER))
    assert resumed.returncode == 0, resumed.stderr
    assert "going on from step 2" in resumed.stderr
    expected, ours = checkpoint(place / "ranks"), checkpoint(place / "ranks-killed")
    assert len(expected["rng"]) == 2
    assert all(same(ours[name], expected[name]) for name in expected)
    assert (place / "ranks-killed" / "log.csv").read_text() == (place / "ranks" / "log.csv").read_text()
    fewer = subprocess.run(
        [sys.executable, *command(place, "ranks-fewer", *FEWER)], capture_output=True, text=True, env=environment()
    )
    assert fewer.returncode == 0, fewer.stderr
    assert "going on from step 2" in fewer.stderr
    assert checkpoint(place / "ranks-fewer")["step"] == 4


@pytest.mark.slow
def test_steps_of_one_process_and_more_ranks(place) -> None:
    """Without random numbers two ranks take the steps of one process; a frozen tower is whole on every rank."""
    call = (*STILL, *FEWER)
    alone = subprocess.run([sys.executable, *command(place, "alone", *call)], capture_output=True, text=True,
                           env=environment())  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    both = torchrun(2, command(place, "both", *call))
    assert both.returncode == 0, both.stderr
    assert losses(place / "both") == pytest.approx(losses(place / "alone"), rel=1e-4)
    frozen = torchrun(2, command(place, "frozen-ranks", *call, "--set", "model.freeze=true"))
    assert frozen.returncode == 0, frozen.stderr
    assert not any(name.startswith("backbone.") for name in checkpoint(place / "frozen-ranks")["model"])


def test_a_batch_that_does_not_divide(place, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    expected = "data.batch: expected a multiple of 3 ranks x data.micro_batch=2, got 4"
    assert expected in refused(place, "odd").replace("\n", "")
