"""Activations are moved once: at most 1.02 of the floor forward, 1.05 backward."""

import byte_count
import pytest


@pytest.mark.parametrize("channels", [1024, 3200])
@pytest.mark.parametrize("op", byte_count.cases(1024))
def test_activation_bytes(op, channels):
    row = byte_count.measure(op, channels)
    assert 1.0 <= row["activations"] <= (1.05 if op.endswith("backward") else 1.02)


def test_attention_reads_keys_once_per_tile_of_queries():
    row = byte_count.measure_attention(257)
    assert row["K and V reads"] == 3  # 257 queries are three tiles of 128
    assert 1.0 <= row["q, out, lse"] <= 1.02
