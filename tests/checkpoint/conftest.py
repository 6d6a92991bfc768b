"""A saved checkpoint."""

from pathlib import Path

import pytest

from internvit.checkpoint.save import save_pretrained
from tests.checkpoint.models import PLAIN, make_model


@pytest.fixture
def saved(tmp_path) -> Path:
    """A sharded checkpoint of PLAIN."""
    return save_pretrained(make_model(PLAIN), tmp_path / "saved", max_shard_size="1MB")
