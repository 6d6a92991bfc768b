"""The fixtures of tests that run csrc/cuda on the host."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from internvit.ops.core import select as backends
from tests.proofs.cuda import host


@pytest.fixture(scope="session")
def host_library(tmp_path_factory) -> Path:
    return host.build_library(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture
def on_host(host_library, monkeypatch) -> Iterator[None]:
    """Backend `cuda` takes CPU tensors, and its kernels run on the host."""
    monkeypatch.setitem(backends.BACKENDS, "cuda", host.as_backend(host_library))
    for cache in (backends.implementation, backends._resolve_once):
        cache.cache_clear()
    yield
    for cache in (backends.implementation, backends._resolve_once):
        cache.cache_clear()
