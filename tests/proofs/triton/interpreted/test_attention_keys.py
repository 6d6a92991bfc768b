"""Attention with other keys than queries: batches, and packs with sequences of keys of their own."""

import itertools

import pytest
import torch

from internvit import numerics
from internvit.kernels.attention import config as attention_configs
from internvit.kernels.attention.config import AttentionConfig
from internvit.ops.core.sequences import Sequences
from tests.proofs.triton.interpreted.harness import Memory
from tests.proofs.triton.interpreted.test_attention_packed import cu_seqlens, part, solve

QUERIES, KEYS = (0, 33, 3, 17, 40, 1), (5, 20, 0, 33, 1, 0)
"""Tiles of 16 and 32 rows: a token apart on either side, on both and on none, whole tiles and masked ones, and none."""
TILES = [((16, 32), 64), ((32, 16), 72), ((32, 32), 128)]
BY_QUERY = ("out", "lse", "grad_q")


def inputs(memory, queries, keys, heads, dtype, generator):
    """q, k, v and grad_out [tokens, H, D] of two lengths; k and v are views of one buffer."""
    H, D = heads
    q, grad_out = (memory.place(torch.randn(queries, H, D, generator=generator).to(dtype)) for _ in range(2))
    kv = memory.place(torch.randn(keys, 2, H, D, generator=generator).to(dtype))
    return q, *kv.unbind(1), grad_out


def sequences_of(queries, keys):
    """With longest sequences that are longer than they are."""
    return Sequences(cu_seqlens(queries), max(queries) + 16, cu_seqlens(keys), max(keys) + 3)


def rows_of(name, x, queries, keys):
    return x[:, queries] if name == "lse" else x[queries if name in BY_QUERY else keys]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("tiles", "head_dim"), TILES)
def test_packs_against_float64_and_alone_and_dense(tiles, head_dim, generator, monkeypatch):
    """A sequence has the bits that it has alone, and as a batch of one."""
    monkeypatch.setattr(attention_configs, "attention_config", lambda *_: AttentionConfig(*tiles, 4, 1))
    memory, sequences = Memory(), sequences_of(QUERIES, KEYS)
    tensors = inputs(memory, sum(QUERIES), sum(KEYS), (2, head_dim), torch.float32, generator)
    packed, _ = solve(memory, tensors, None, sequences)
    truth, _ = solve(Memory(), [t.double() for t in tensors], None, sequences, "reference")
    for name, x in packed.items():
        if name == "lse":
            assert torch.equal(x.isinf(), truth[name].isinf())
            x, truth[name] = (t.masked_fill(t.isinf(), 0.0) for t in (x, truth[name]))
        assert numerics.relative_error(x, truth[name]) <= 4e-6, name
    ends = (itertools.pairwise(t.tolist()) for t in (sequences.cu_seqlens, sequences.cu_seqlens_k))
    for rows, columns in zip(*([slice(*pair) for pair in pairs] for pairs in ends), strict=True):
        (q, grad_out), (k, v) = (
            part(t, None, where)[0] for t, where in ((tensors[::3], rows), (tensors[1:3], columns))
        )
        alone, _ = solve(memory, (q, k, v, grad_out), None, sequences_of((len(q),), (len(k),)))
        dense, _ = solve(memory, [t.unsqueeze(0) for t in (q, k, v, grad_out)], None, None)
        for name, x in packed.items():
            assert torch.equal(rows_of(name, x, rows, columns), alone[name]), f"{name} of {len(q)} and {len(k)}"
            assert torch.equal(alone[name], dense[name].squeeze(0)), f"{name} of {len(q)} and {len(k)}"


@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_neighbours_cannot_be_seen(value, generator):
    memory, sequences = Memory(), sequences_of((5, 20, 7), (9, 2, 40))
    tensors = inputs(memory, 32, 51, (1, 64), torch.float32, generator)
    before, _ = solve(memory, tensors, None, sequences)
    for t, (first, last) in zip(tensors, ((5, 25), (9, 11), (9, 11), (5, 25)), strict=True):
        t[:first], t[last:] = value, value
    after, _ = solve(memory, tensors, None, sequences)
    for name, x in before.items():
        where = slice(5, 25), slice(9, 11)
        assert torch.equal(rows_of(name, after[name], *where), rows_of(name, x, *where)), name


@pytest.mark.parametrize(("queries", "keys"), [((3, 0), (0, 0)), ((0, 0), (4, 1)), ((0,), (0,))])
def test_packs_without_any_query_or_key(queries, keys, generator):
    tensors = inputs(Memory(), sum(queries), sum(keys), (2, 16), torch.float32, generator)
    for name, x in solve(Memory(), tensors, None, sequences_of(queries, keys))[0].items():
        assert (x == (-float("inf") if name == "lse" else 0)).all(), name
