"""Starts kernels: on the tensors' device and current stream, with launch choices by rule or from a tuned file.

A launch choice is a small frozen dataclass beside each kernel, made by an analytic rule from shape, dtype and target;
nothing is tuned at run time. `python -m internvit.kernels.tools.tune` writes a file of measured choices, which is read
from this package's folder `tuned/` or the user's cache directory and goes before the rule.
"""

import contextlib
import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from triton.runtime import driver


@dataclasses.dataclass(frozen=True)
class Target:
    """What a launch rule may know of a device.

    Attributes:
        name: sm_90, gfx942, ...
        multiprocessors: persistent kernels start at most two programs on each.
        shared_bytes: the most shared memory one program may hold.
        warp_size: threads of a warp.
    """

    name: str
    multiprocessors: int
    shared_bytes: int
    warp_size: int = 32

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")


TARGETS = {
    t.name: t
    for t in (
        Target("sm_80", 108, 163 * 1024),  # A100
        Target("sm_90", 132, 227 * 1024),  # H100
        Target("sm_100", 148, 227 * 1024),  # B200
        Target("gfx942", 304, 64 * 1024, 64),  # MI300X
    )
}
INTERPRETER = Target("interpreter", 4, 227 * 1024)  # 8 programs at most: partial rows are summed, tests stay short


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel start, as the static profiler sees it."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclasses.dataclass
class Recording:
    """Stands in for a device: launches are kept instead of run, tensors may be on `meta`."""

    target: Target
    launches: list[Launch] = dataclasses.field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("internvit_recording", default=None)


@contextlib.contextmanager
def record(target: Target) -> Iterator[list[Launch]]:
    """Inside, kernels are not run; the launches that `target` would have got are appended to the list."""
    recording = Recording(target)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def target_of(x: Tensor) -> Target:
    recording = _recording.get()
    if recording is not None:
        return recording.target
    return _target_of_device(x.device.index or 0) if x.is_cuda else INTERPRETER


@functools.cache
def _target_of_device(index: int) -> Target:
    shared_bytes = driver.active.utils.get_device_properties(index)["max_shared_mem"]
    properties = torch.cuda.get_device_properties(index)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    return Target(name, properties.multi_processor_count, shared_bytes, properties.warp_size)


def run(kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int, num_stages: int = 1, **constants: Any) -> None:
    """Starts `kernel` on the device and current stream of its tensors; an empty grid starts nothing."""
    if 0 in grid:
        return
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, grid, args, constants, num_warps, num_stages))
        return
    with torch.cuda.device_of(next(a for a in args if isinstance(a, Tensor))):
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)


def tuned_files(target: Target) -> tuple[Path, ...]:
    """Where measured choices for `target` are looked for; the user's own go first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return tuple(
        folder / f"{target.name}.json" for folder in (cache / "internvit", Path(__file__).parents[1] / "tuned")
    )


@functools.cache
def _tuned(target: Target) -> dict[str, dict[str, dict[str, int]]]:
    choices: dict[str, dict[str, dict[str, int]]] = {}
    for path in reversed(tuned_files(target)):
        if path.is_file():
            for kernel, by_key in _read(path).items():
                choices.setdefault(kernel, {}).update(by_key)
    return choices


def _read(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """The choices in a tuned file; none, and a warning, if it is broken: the rules serve without it."""
    try:
        choices = json.loads(path.read_text())["choices"]
        for kernel, by_key in choices.items():
            for key, fields in by_key.items():
                wrong = {name: value for name, value in fields.items() if type(value) is not int or value < 0}
                if wrong:
                    raise ValueError(f"{kernel}, {key}: numbers are expected, got {wrong}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _ignore(path, f"{type(error).__name__}: {error}")
        return {}
    return choices


def _ignore(what: object, why: str) -> None:
    warnings.warn(
        f"{what} holds no launch choices ({why}): rules are used instead; delete it, or write it anew with "
        "`python -m internvit.kernels.tools.tune --out FILE`",
        RuntimeWarning,
        stacklevel=2,
    )


Choice = TypeVar("Choice")


def choose(choice: type[Choice], kernel: str, key: str, target: Target, rule: Callable[[], Choice]) -> Choice:
    """The measured choice for (`kernel`, `key`) on `target` where there is one, else the rule's."""
    measured = _tuned(target).get(kernel, {}).get(key)
    if measured is None:
        return rule()
    try:
        return choice(**measured)
    except TypeError as error:  # a file of another version of this library
        _ignore(f"the tuned file's entry {kernel}, {key}", str(error))
        return rule()
