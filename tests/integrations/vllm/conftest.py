"""An environment for vLLM, for the tests that use it."""

from collections.abc import Iterator

import pytest

from tests.integrations.vllm.environment import variables


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(tmp_path_factory.mktemp("vllm-cache")).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def poisoned_memory() -> None:
    """None of it: vLLM's CPU attention reads blocks of the cache that nobody has written, and masks them."""
