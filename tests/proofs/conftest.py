"""The fixture of tests that build native code."""

import pytest

from tests.support.building import BuildFolder


@pytest.fixture(scope="session")
def build_folder(tmp_path_factory, request) -> BuildFolder:
    """Shared by the workers of a run: each has a folder of its own in the run's."""
    base = tmp_path_factory.getbasetemp()
    return BuildFolder((base.parent if hasattr(request.config, "workerinput") else base) / "build")
