"""The fixtures of tests that run csrc/cuda on the host."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from internvit.ops.backends import registry
from tests.proofs.cuda import host
from tests.support.choices import forget_choices


@pytest.fixture(scope="session")
def host_library(build_folder) -> Path:
    return host.build_library(build_folder)


@pytest.fixture
def on_host(host_library, monkeypatch) -> Iterator[None]:
    """Backend `cuda` takes CPU tensors, and its kernels run on the host."""
    registry.BACKENDS["cuda"].unavailable_reason()  # loads the library, whose ops the module registers once
    importlib.import_module("internvit.ops.backends.cuda")
    monkeypatch.setattr(registry, "_IMPLEMENTATIONS", registry._IMPLEMENTATIONS.copy())
    monkeypatch.setitem(registry.BACKENDS, "cuda", host.as_backend(host_library))
    forget_choices()
    yield
    forget_choices()
