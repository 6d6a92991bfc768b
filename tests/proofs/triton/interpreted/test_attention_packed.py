"""Attention of packed sequences: each has the bits that it has alone and dense, and float64's values."""

import itertools

import pytest
import torch

from internvit import numerics
from internvit.kernels.attention import config as attention_configs
from internvit.kernels.attention.config import AttentionConfig
from internvit.ops import attention
from internvit.ops.backends.registry import implementation
from internvit.ops.core.attention_math import QKNorm, SavedAttention
from internvit.ops.core.sequences import Sequences
from tests.proofs.triton.interpreted.harness import Memory

LENGTHS = (0, 33, 3, 0)
"""Sequences and tiles of 16 and 32 rows: none, the first token alone left over, and a masked tail."""
NAMES = ("out", "lse", "grad_q", "grad_k", "grad_v", "row_dot_q", "row_dot_k")


def cu_seqlens(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def pack(memory, tokens, heads, dtype, normed, generator, distribution="normal"):
    """q, k, v and grad_out [tokens, H, D], the first three views of one buffer, and QK-norm or None."""
    H, D = heads
    qkv = memory.place(numerics.sample((tokens, 3 * H * D), distribution, dtype, generator).view(tokens, 3, H, D))
    grad_out = memory.place(torch.randn(tokens, H, D, generator=generator).to(dtype))
    q, k, v = qkv.unbind(1)
    if not normed:
        return (q, k, v, grad_out), None
    weights = (memory.place((1 + 0.3 * torch.randn(H * D, generator=generator)).to(dtype)) for _ in range(2))
    rstd = (memory.place((t.float().square().mean((1, 2)) + 1e-6).rsqrt()) for t in (q, k))
    return (q, k, v, grad_out), QKNorm(*weights, *rstd)


def solve(memory, tensors, norm, sequences, backend="triton"):
    """`NAMES` and the gradients of the weights, on guarded and poisoned memory."""
    q, k, v, grad_out = tensors
    given = () if sequences is None else (sequences,)
    grads = [memory.empty(tuple(t.shape), t.dtype) for t in (q, k, v)]
    with memory.allocations():
        out, lse = implementation("attention", backend)(q, k, v, 0.125, norm, *given)
        saved = SavedAttention(q, k, v, out, lse, 0.125, norm, sequences)
        sums = implementation("attention_backward", backend)(grad_out, saved, grads)
    memory.check_guards()
    weights, row_dots = ((), ()) if sums is None else (sums[:2], sums[2:])
    return dict(zip(NAMES, (out, lse, *grads, *row_dots), strict=False)), weights


def part(tensors, norm, rows, dense=False):
    """The inputs of one sequence, as a pack or as an image."""
    cut = [t[rows] for t in tensors]
    rstd = [] if norm is None else [t[rows] for t in norm[2:]]
    if dense:
        cut, rstd = ([t.unsqueeze(0) for t in some] for some in (cut, rstd))
    return cut, None if norm is None else QKNorm(*norm[:2], *rstd)


def rows_of(name, x, rows):
    """One sequence's part of an output of a pack; heads come first in float32 sums of rows."""
    return x[:, rows] if name == "lse" or name.startswith("row_dot") else x[rows]


SAME_BITS = [
    pytest.param(lengths, tiles, head_dim, normed, id=f"{tiles}-D:{head_dim}-{normed}-{len(lengths)}", marks=marks)
    for lengths, marks in ((LENGTHS, ()), ((1, *LENGTHS, 40, 48), pytest.mark.slow))
    for tiles, head_dim, normed in (((16, 32), 64, False), ((32, 16), 64, True), ((32, 32), 72, True))
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("lengths", "tiles", "head_dim", "normed"), SAME_BITS)
def test_same_bits_in_a_pack_alone_and_dense(lengths, tiles, head_dim, normed, generator, monkeypatch):
    """With the masked tile of keys behind the loop, D = 64, and with masks on every tile."""
    monkeypatch.setattr(attention_configs, "attention_config", lambda *_: AttentionConfig(*tiles, 4, 1))
    memory, ends = Memory(), cu_seqlens(lengths)
    tensors, norm = pack(memory, int(ends[-1]), (2, head_dim), torch.bfloat16, normed, generator)
    packed, _ = solve(memory, tensors, norm, Sequences(ends, max(lengths) + 16))  # more than the longest
    for start, end in itertools.pairwise(ends.tolist()):
        rows = slice(start, end)
        alone, _ = solve(memory, *part(tensors, norm, rows), Sequences(cu_seqlens([end - start]), end - start))
        dense, _ = solve(memory, *part(tensors, norm, rows, dense=True), None)
        for name, x in packed.items():
            assert torch.equal(rows_of(name, x, rows), alone[name]), f"{name} of {end - start} tokens"
            assert torch.equal(alone[name], dense[name].squeeze(0)), f"{name} of {end - start} tokens"


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("value", [float("nan"), 1e4])
def test_neighbours_cannot_be_seen(head_dim, value, generator):
    """Sequences between others of NaN, or of numbers that any sum would show."""
    memory, ends = Memory(), cu_seqlens((5, 20, 7))
    tensors, norm = pack(memory, 32, (1, head_dim), torch.float32, True, generator)
    before, _ = solve(memory, tensors, norm, Sequences(ends, 20))
    for t in (*tensors, *norm[2:]):
        t[:5], t[25:] = value, value
    after, _ = solve(memory, tensors, norm, Sequences(ends, 20))
    for name, x in before.items():
        assert torch.equal(rows_of(name, after[name], slice(5, 25)), rows_of(name, x, slice(5, 25))), name


def check_sequences(actual, truth, ends, bound):
    """Each output within `bound` of the truth in each sequence of more than one token: with one key the scores get no
    gradient, only rounding. Relative to its norm there, or to what so many rows of the whole pack have: with few keys a
    softmax that is all but one-hot gives gradients that are differences of numbers of the usual size.
    """
    for start, end in itertools.pairwise(ends.tolist()):
        for name, x in actual.items():
            a, t = (rows_of(name, y, slice(start, end)) for y in (x, truth[name]))
            if end - start > 1 or (end > start and name in ("out", "grad_v")):
                share = (t.numel() / truth[name].numel()) ** 0.5
                size = max(t.double().norm(), share * truth[name].double().norm())
                error = ((a.double() - t.double()).norm() / size).item()
                assert error <= bound, f"{name} of {end - start} tokens is off by {error}"
            else:
                assert a.isfinite().all()
                assert a.numel() == 0 or name == "lse" or a.abs().max() <= 1e-3, name


@pytest.mark.parametrize(
    ("lengths", "heads"),
    [
        ((3, 0, 257, 1), (1, 64)),
        ((1, 130, 3), (1, 72)),
        ((3, 129, 1), (1, 128)),
        pytest.param((257, 1, 1025, 0, 3), (2, 64), marks=pytest.mark.slow),
        pytest.param((257, 1, 1025, 0, 3), (1, 72), marks=pytest.mark.slow),
        pytest.param((257, 1, 1025, 0, 3), (1, 128), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("normed", [False, True])
def test_against_float64(lengths, heads, normed, generator, monkeypatch):
    """float32, in tiles of 64: 30 roundings are 4e-6; 4e-7 were measured."""
    monkeypatch.setattr(attention_configs, "attention_config", lambda *_: AttentionConfig(64, 64, 4, 1))
    memory, sequences = Memory(), Sequences(cu_seqlens(lengths), max(lengths))
    tensors, norm = pack(memory, sum(lengths), heads, torch.float32, normed, generator)
    actual, weights = solve(memory, tensors, norm, sequences)
    assert actual["out"].is_contiguous()
    wide = None if norm is None else QKNorm(*(t.double() for t in norm))
    truth, true_weights = solve(Memory(), [t.double() for t in tensors], wide, sequences, "reference")
    check_sequences(actual, truth, sequences.cu_seqlens, 4e-6)
    for a, t in zip(weights, true_weights, strict=True):
        assert numerics.relative_error(a, t) <= 2e-5  # a sum over all tokens that cancels


@pytest.mark.parametrize("layout", ["heads_first", "channels_first", "expanded"])
def test_strides(layout, generator):
    tensors, _ = pack(Memory(), 21, (2, 64), torch.float32, False, generator)
    expected, _ = solve(Memory(), tensors, None, Sequences(cu_seqlens((4, 17)), 17))
    if layout == "expanded":
        tensors = [t[:, :1].expand(-1, 2, -1) for t in tensors]
        expected, _ = solve(Memory(), [t.contiguous() for t in tensors], None, Sequences(cu_seqlens((4, 17)), 17))
    else:
        order = (1, 0, 2) if layout == "heads_first" else (2, 1, 0)
        tensors = [t.permute(order).contiguous().permute(order) for t in tensors]
    actual, _ = solve(Memory(), tensors, None, Sequences(cu_seqlens((4, 17)), 17))
    assert all(torch.equal(actual[name], x) for name, x in expected.items())


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0)])
@pytest.mark.parametrize("max_seqlen", [0, 5])
def test_no_tokens(lengths, max_seqlen):
    q = torch.randn(0, 2, 16, requires_grad=True)
    weights = torch.randn(32, requires_grad=True), torch.randn(32)
    rstd = torch.ones(0), torch.ones(0)
    given = {"cu_seqlens": cu_seqlens(lengths), "max_seqlen": max_seqlen}
    out = attention(q, q, q, *weights, *rstd, **given, backend="triton")
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), (q, weights[0]))
    assert grads[0].shape == q.shape
    assert torch.equal(grads[1], torch.zeros(32))
