"""A tower, and photographs some of which are broken."""

from pathlib import Path

import pytest

from tests.support.photos import save_tower, write_photos


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return save_tower(tmp_path_factory.mktemp("tower"))


@pytest.fixture
def photos(tmp_path, seed) -> list[Path]:
    return write_photos(tmp_path / "in", 30, seed, broken=(4, 17, 29))
