"""The token that whole tiles leave over is taken apart: for every way in which tokens and tiles can meet."""

import pytest
import torch

from internvit import numerics
from internvit.kernels.attention import config as attention_configs
from internvit.kernels.attention.config import AttentionConfig
from tests.proofs.triton.interpreted.harness import Memory, run
from tests.proofs.triton.interpreted.test_attention import NAMES, emulate, problem, solve, solve_in
from tests.proofs.triton.interpreted.test_qk_norm import statistics


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens", "expected"),  # peeled of rows, of columns, masked tail
    [
        (16, 16, 32, (False, False, False)),
        (16, 16, 33, (True, True, False)),
        (32, 16, 33, (True, True, False)),
        (16, 32, 33, (True, True, False)),
        (16, 32, 49, (True, False, True)),
        (32, 16, 49, (False, True, False)),
        (32, 16, 34, (False, False, True)),
    ],
)
@pytest.mark.parametrize("norm", ["none", "same"])
@pytest.mark.parametrize("head_dim", [24, 64])
def test_against_float64(rows, columns, tokens, expected, norm, head_dim, seed, monkeypatch):
    config = AttentionConfig(rows, columns, 4, 1)
    assert config.peeling(tokens) == expected
    monkeypatch.setattr(attention_configs, "attention_config", lambda *_: config)
    case = {"heads": (2, head_dim), "tokens": tokens, "dtype": "bfloat16", "layout": "packed", "norm": norm}
    inputs, grad_out, grads, memory = problem({**case, "distribution": "normal"}, seed)
    (out, _), actual = solve(inputs, grad_out, grads, memory)
    (truth_out, _), truth = solve_in(torch.float64, inputs, grad_out)
    emulated_out, _, emulated_grads, emulated_sums = emulate(*inputs, grad_out, out, torch.bfloat16)
    # single draws of the sums lie within 1.24 times the emulation's error; a token lost or taken twice is far beyond 2
    emulated = (emulated_out, *emulated_grads, *emulated_sums)
    for name, a, t, e in zip(("out", *NAMES), (out, *actual), (truth_out, *truth), emulated, strict=False):
        assert numerics.relative_error(a, t) <= 2 * numerics.relative_error(e, t), name


def test_same_bits_alone_and_in_a_batch_and_again(generator):
    """Forward and backward at 4 * 16 + 1 tokens, float32's and bfloat16's tiles of the rule."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, grad_out = torch.randn(4, 2, 65, 2, 64, generator=generator).to(dtype).unbind(0)
        weights = torch.ones(128).to(dtype), torch.ones(128).to(dtype)
        results = []
        for batch in (slice(0, 2), slice(0, 2), slice(0, 1), slice(1, 2)):
            memory = Memory()
            one = [t[batch].contiguous() for t in (q, k, v, grad_out)]
            rstd = statistics(memory, *one[:2])
            out, lse = run(memory, "attention", *one[:3], 0.125, *weights, *rstd)
            grads = [torch.empty_like(one[0]) for _ in range(3)]
            backward = (one[3], *one[:3], out, lse, 0.125, *weights, *rstd, *grads)
            sums = run(memory, "attention_backward", *backward)
            results.append([out, lse, *grads, *sums[2:]])
        for both, again, *alone in zip(*results, strict=True):
            assert torch.equal(both, again)
            assert torch.equal(both, torch.cat(alone))
