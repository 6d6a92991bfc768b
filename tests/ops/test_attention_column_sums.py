"""How much each token is attended to; what every op keeps is tried in test_inference_ops.py."""

import itertools

import pytest
import torch
from torch import Tensor

from internvit.numerics import relative_error, sample
from internvit.ops import attention_column_sums, qk_norm_stats
from internvit.ops.attention import ATTENTION
from internvit.ops.backends.registry import backends_for
from internvit.ops.core.spec import INFERENCE_SPECS
from tests.support.layouts import LAYOUTS, laid_out

SPEC = INFERENCE_SPECS["attention_column_sums"]
backends = pytest.mark.parametrize("backend", backends_for(SPEC.op, "cpu", torch.float32))


def inputs(tokens, heads, dtype, normed, generator, batch=1, distribution="normal"):
    """q and k, views of one buffer, and QK-norm's weights and statistics or none."""
    H, D = heads
    qkv = sample((batch, tokens, 3, H, D), distribution, dtype, generator)
    given = dict(zip("qk", qkv.unbind(2), strict=False))
    if normed:
        given |= {n: 1 + 0.3 * sample((H * D,), "normal", dtype, generator) for n in ("q_weight", "k_weight")}
        given |= zip(("rstd_q", "rstd_k"), qk_norm_stats(given["q"], given["k"], backend="reference"), strict=True)
    return given


def lse_of(given, backend):
    inside = [given.get(n) for n in ("q_weight", "k_weight", "rstd_q", "rstd_k")]
    q, k = given["q"], given["k"]
    return ATTENTION.call((q, k, k, q.shape[-1] ** -0.5, *inside, None, None, None, None), backend)[1]


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_against_float64_and_the_number_of_tokens(backend, dtype, normed, generator) -> None:
    """Also with forward's own lse, which gives the same bits."""
    for tokens, heads in ((1, (2, 64)), (3, (3, 40)), (257, (2, 64)), (1025, (1, 64)), (67, (1, 128)), (33, (1, 136))):
        for distribution in ("normal", "massive"):
            given = inputs(tokens, heads, dtype, normed, generator, distribution=distribution)
            sums = attention_column_sums(**given, backend=backend)
            assert not SPEC.violations(given, (sums,), SPEC.truth(given), (sums,)), (tokens, heads, distribution)
            assert torch.equal(attention_column_sums(**given, lse=lse_of(given, backend), backend=backend), sums)

            if distribution == "normal":
                torch.testing.assert_close(sums.sum(-1), torch.full(sums.shape[:2], float(tokens)), rtol=3e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_same_bits_for_threads_batches_and_packs(dtype, generator) -> None:
    given = inputs(67, (3, 64), dtype, True, generator, batch=3)
    expected = attention_column_sums(**given, backend="cpu")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(attention_column_sums(**given, backend="cpu"), expected)
            lengths = (67, 1, 0, 33, 100)
            ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
            flat = {n: t.flatten(0, 1) if t.dim() > 1 else t for n, t in given.items()}
            packed = attention_column_sums(**flat, cu_seqlens=ends, backend="cpu")
            for start, end in itertools.pairwise(ends.tolist()):
                alone = {n: t[None, start:end] if n[0] in "qkr" and "weight" not in n else t for n, t in flat.items()}
                one = attention_column_sums(**alone, backend="cpu")
                assert torch.equal(packed[:, start:end], one[0])
    finally:
        torch.set_num_threads(threads)
    for image in range(3):
        alone = {n: t[image : image + 1] if t.dim() > 1 else t for n, t in given.items()}
        assert torch.equal(attention_column_sums(**alone, backend="cpu"), expected[image : image + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_instruction_set(dtype, generator) -> None:
    native = torch.ops.internvit_cpu
    given = inputs(67, (2, 40), dtype, True, generator)
    truth = SPEC.truth(given)
    best = native.use_instruction_set("generic")
    try:
        for name in native.instruction_sets().split():
            native.use_instruction_set(name)
            sums = attention_column_sums(**given, backend="cpu")
            assert not SPEC.violations(given, (sums,), truth, (sums,)), name
    finally:
        native.use_instruction_set(best)


@backends
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, layout, generator) -> None:
    given = inputs(7, (2, 24), torch.float32, True, generator, batch=2)
    moved = given | {n: laid_out(given[n], layout) for n in "qk"}
    actual = attention_column_sums(**moved, backend=backend)
    expected = attention_column_sums(**{n: t.contiguous() for n, t in moved.items()}, backend=backend)
    if backend == "cpu":
        assert torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected)


@backends
def test_scores_of_any_size(backend, generator) -> None:
    """A probability stays at most 1, also where lse's rounding would make it infinite; NaN stays NaN."""
    given = inputs(9, (1, 64), torch.float32, False, generator)
    given = {n: 1e5 * t for n, t in given.items()}
    sums = attention_column_sums(**given, backend=backend)
    assert sums.isfinite().all()
    assert sums.max() <= 9
    q = given["q"].clone()
    q[0, 2] = torch.nan
    assert attention_column_sums(q, given["k"], backend=backend).isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.ones(2, 3, 16)), r"k must have q's shape"),
        (dict(lse=torch.ones(2, 3, 2)), r"lse must have shape \[2, 2, 3\] \(q's \[B, H, N\]\), got \[2, 3, 2\]"),
        (dict(scale=float("nan")), "scale must be a finite number"),
        (dict(q_weight=torch.ones(16)), "go together"),
        (dict(cu_seqlens=torch.tensor([0, 3])), r"cu_seqlens must be torch.int32"),
    ],
)
def test_bad_input(change, message) -> None:
    heads = {n: torch.ones(2, 3, 2, 8) for n in "qk"}
    with pytest.raises(ValueError, match=message):
        attention_column_sums(**{**heads, **change})


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, torch.ones(2, 3, 16), "k must have"),
        (2, torch.ones(2, 3, 2), "lse must have shape"),
        (3, float("inf"), "scale must be"),
        (4, torch.ones(16), "all four or none"),
    ],
)
def test_bad_input_of_the_raw_op(place: int, value: Tensor, message: str) -> None:
    args = [torch.ones(2, 3, 2, 8), torch.ones(2, 3, 2, 8), torch.zeros(2, 2, 3), 1.0, None, None, None, None]
    args[place] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.internvit_cpu.attention_column_sums(*args)


def test_bfloat16_and_float64_agree(generator) -> None:
    given = inputs(257, (2, 64), torch.bfloat16, False, generator)
    wide = {n: t.double() for n, t in given.items()}
    assert relative_error(attention_column_sums(**given), attention_column_sums(**wide)) < 2e-4
