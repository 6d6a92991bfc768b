"""Sums over the columns of attention against float64, and each sequence's bits in a pack, alone and dense."""

import itertools

import pytest
import torch

from internvit.kernels.attention import config as attention_configs
from internvit.kernels.attention.config import AttentionConfig
from internvit.ops.backends.registry import implementation
from internvit.ops.core.attention_math import QKNorm
from internvit.ops.core.sequences import Sequences
from internvit.ops.core.spec import INFERENCE_SPECS
from tests.proofs.triton.interpreted.harness import Memory, parametrize
from tests.proofs.triton.interpreted.harness import generator as generator_of
from tests.proofs.triton.interpreted.test_attention_packed import cu_seqlens, pack, part

SCALE = 0.125
SPEC = INFERENCE_SPECS["attention_column_sums"]


def solve(memory, q, k, norm, sequences=None):
    """The sums with forward's lse, on guarded and poisoned memory."""
    given = () if sequences is None else (sequences,)
    with memory.allocations():
        _, lse = implementation("attention", "triton")(q, k, k, SCALE, norm, *given)
        sums = implementation("attention_column_sums", "triton")(q, k, lse, SCALE, norm, sequences)
    memory.check_guards()
    assert sums.dtype == torch.float32
    return sums


@parametrize(
    ("tokens", "tiles", "normed"),
    tokens=(1, 3, 17, 33, 64),
    tiles=((16, 32), (32, 16), (64, 64)),
    head_dim=(40, 64, 128),
    normed=(False, True),
    dtype=("float32", "bfloat16", "float16"),
)
def test_against_float64(case, monkeypatch):
    """Tiles that are whole, leave the first token over, or a masked tail."""
    monkeypatch.setattr(attention_configs, "attention_config", lambda *_: AttentionConfig(*case["tiles"], 4, 1))
    dtype, tokens, heads = getattr(torch, case["dtype"]), case["tokens"], (2, case["head_dim"])
    memory, generator = Memory(), generator_of(case)
    tensors, norm = pack(memory, 2 * tokens, heads, dtype, case["normed"], generator)
    q, k = (t.unflatten(0, (2, tokens)) for t in tensors[:2])
    if norm is not None:
        norm = norm._replace(rstd_q=norm.rstd_q.view(2, tokens), rstd_k=norm.rstd_k.view(2, tokens))
    sums = solve(memory, q, k, norm)
    arguments = {"q": q, "k": k, "scale": SCALE, **({} if norm is None else norm._asdict())}
    assert not SPEC.violations(arguments, (sums,), SPEC.truth(arguments), (sums,))
    torch.testing.assert_close(sums.sum(-1), torch.full((2, 2), float(tokens)), rtol=1e-5, atol=0)
    assert torch.equal(
        solve(memory, q[:1], k[:1], norm and norm._replace(rstd_q=norm.rstd_q[:1], rstd_k=norm.rstd_k[:1])), sums[:1]
    )


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("tiles", [(16, 32), (32, 16)])
def test_same_bits_in_a_pack_alone_and_dense(tiles, normed, generator, monkeypatch):
    monkeypatch.setattr(attention_configs, "attention_config", lambda *_: AttentionConfig(*tiles, 4, 1))
    lengths = (0, 33, 3, 0, 17)
    memory, ends = Memory(), cu_seqlens(lengths)
    tensors, norm = pack(memory, int(ends[-1]), (2, 64), torch.bfloat16, normed, generator)
    packed = solve(memory, *tensors[:2], norm, Sequences(ends, max(lengths) + 16))
    for start, end in itertools.pairwise(ends.tolist()):
        rows = slice(start, end)
        (q, k, *_), inside = part(tensors, norm, rows)
        alone = solve(memory, q, k, inside, Sequences(cu_seqlens([end - start]), end - start))
        (q, k, *_), inside = part(tensors, norm, rows, dense=True)
        assert torch.equal(packed[:, rows], alone)
        assert torch.equal(alone, solve(memory, q, k, inside)[0])


def test_neighbours_cannot_be_seen_and_nan_stays(generator):
    memory, ends = Memory(), cu_seqlens((5, 20, 7))
    tensors, norm = pack(memory, 32, (1, 64), torch.float32, True, generator)
    for inside in (norm, None):
        before = solve(memory, *tensors[:2], inside, Sequences(ends, 20))[:, 5:25]
        changed = [t.clone() for t in tensors[:2]]
        rstd = None if inside is None else QKNorm(*inside[:2], *(t.clone() for t in inside[2:]))
        for t in (*changed, *(() if rstd is None else rstd[2:])):
            t[:5], t[25:] = torch.nan, torch.nan
        after = solve(memory, *changed, rstd, Sequences(ends, 20))
        assert torch.equal(after[:, 5:25], before)
        assert after[:, :5].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 2, 16), (2, 0, 2, 16)])
def test_no_tokens(shape):
    q = torch.randn(shape)
    assert solve(Memory(), q, q, None).shape == (shape[0], 2, shape[1])
