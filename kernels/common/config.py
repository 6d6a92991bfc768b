"""Launch configurations: by rule from shape, dtype and target, or measured and read from a file.

A configuration is a small frozen dataclass beside each kernel; nothing is tuned at run time.
`python -m internvit.kernels.tools.tune` writes a file of measured ones, which is read from this package's folder
`tuned/` or the user's cache directory and takes precedence over the rules. The file may also name, for an op, a library
that was faster than the kernels of this package.
"""

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from internvit.kernels.common.target import Target


def tuned_files(target: Target) -> tuple[Path, ...]:
    """Where measured configurations of `target` are looked for; the user's own take precedence."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return tuple(
        folder / f"{target.name}.json" for folder in (cache / "internvit", Path(__file__).parents[1] / "tuned")
    )


_Configs = dict[str, dict[str, dict[str, int]]]


class TunedBackend(NamedTuple):
    """What was measured to be faster for an op than this package's kernels: a backend and its library's name."""

    backend: str
    library: str


class _Tuned(NamedTuple):
    """What tuned files say, by kernel or op, and key."""

    configs: _Configs
    backends: dict[str, dict[str, TunedBackend]]


@functools.cache
def _tuned(target: Target) -> _Tuned:
    tuned = _Tuned({}, {})
    for path in reversed(tuned_files(target)):
        if path.is_file():
            read = _read(path)
            for kernel, configs in read.configs.items():
                tuned.configs.setdefault(kernel, {}).update(configs)
            for op, backends in read.backends.items():
                tuned.backends.setdefault(op, {}).update(backends)
    return tuned


def _read(path: Path) -> _Tuned:
    """What a tuned file says; nothing, and a warning, if it is broken: the rules serve without it."""
    try:
        content = json.loads(path.read_text())
        configs = content["configs"]
        for kernel, by_key in configs.items():
            for key, fields in by_key.items():
                wrong = {name: value for name, value in fields.items() if type(value) is not int or value < 0}
                if wrong:
                    raise ValueError(f"{kernel}, {key}: numbers are expected, got {wrong}")
        backends = {
            op: {key: TunedBackend(**named) for key, named in by_key.items()}
            for op, by_key in content.get("backends", {}).items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn_ignored(path, f"{type(error).__name__}: {error}")
        return _Tuned({}, {})
    return _Tuned(configs, backends)


def tuned_backend(op: str, key: str, target: Target) -> TunedBackend | None:
    """The backend that was measured to be the fastest for (`op`, `key`) on `target`; None where none was."""
    return _tuned(target).backends.get(op, {}).get(key)


_measured: ContextVar[Mapping[str, Any] | None] = ContextVar("internvit_measured", default=None)


@contextlib.contextmanager
def measured_configs(configs: Mapping[str, Mapping[str, Mapping[str, int]]]) -> Iterator[None]:
    """Inside, these configurations go before those of files, as far as none was looked up and cached before."""
    token = _measured.set(configs)
    try:
        yield
    finally:
        _measured.reset(token)


def _warn_ignored(what: object, why: str) -> None:
    warnings.warn(
        f"{what} holds no launch configurations ({why}): rules are used instead; delete it, or write it anew with "
        "`python -m internvit.kernels.tools.tune --out FILE`",
        RuntimeWarning,
        stacklevel=2,
    )


Config = TypeVar("Config")


def choose(config: type[Config], kernel: str, key: str, target: Target, rule: Callable[[], Config]) -> Config:
    """The measured configuration for (`kernel`, `key`) on `target` where there is one, else the rule's."""
    measured = (_measured.get() or {}).get(kernel, {}).get(key) or _tuned(target).configs.get(kernel, {}).get(key)
    if measured is None:
        return rule()
    try:
        return config(**measured)
    except TypeError as error:  # a file of another version of this library
        _warn_ignored(f"the tuned file's entry {kernel}, {key}", str(error))
        return rule()


@dataclass(frozen=True)
class Call:
    """A call `function(config, *args)`, whose kernel takes its configuration as `kernel` and `key` of a tuned file."""

    kernel: str
    key: str
    config: Any
    function: Callable[..., Any]
    args: tuple[Any, ...]


_calls: ContextVar[list[Call] | None] = ContextVar("internvit_calls", default=None)


@contextlib.contextmanager
def record_calls() -> Iterator[list[Call]]:
    """Inside, the calls of launch functions are appended to the list; they run as ever."""
    calls: list[Call] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


def recording() -> bool:
    """Whether `record_calls` is in force; else a launch needs no name of its configuration."""
    return _calls.get() is not None


def call(kernel: str, key: str, config: Config, function: Callable[..., Any], *args: Any) -> Any:
    """`function(config, *args)`, seen by `record_calls`."""
    calls = _calls.get()
    if calls is not None:
        calls.append(Call(kernel, key, config, function, args))
    return function(config, *args)
