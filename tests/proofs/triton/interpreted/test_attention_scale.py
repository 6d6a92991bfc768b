"""Attention's maximum is taken of raw scores and scaled: negative scales, zero and large scores keep their softmax."""

import pytest
import torch

from internvit import numerics
from tests.proofs.triton.interpreted.harness import Memory, run
from tests.proofs.triton.interpreted.test_qk_norm import statistics
from tests.support.implementations import call


@pytest.mark.parametrize("tokens", [17, 33, 40])  # one more than whole tiles, and a masked tail
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3, 300.0, -300.0])
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "QK-norm"])
def test_scales_of_any_sign(tokens, scale, folded, generator):
    memory, dtype = Memory(), torch.float32
    q, k, v, grad = (memory.place(torch.randn(1, tokens, 2, 16, generator=generator)) for _ in range(4))
    norm = (None,) * 4
    if folded:
        weights = (memory.place(1 + 0.1 * torch.randn(32, generator=generator)) for _ in range(2))
        norm = (*weights, *(memory.place(t) for t in statistics(memory, q, k)))
    out, lse = run(memory, "attention", q, k, v, scale, *norm)
    wide = [None if t is None else t.double() for t in (q, k, v, *norm)]
    truth, truth_lse = call("attention", "reference", *wide[:3], scale, *wide[3:])
    eps = torch.finfo(dtype).eps * max(1.0, abs(scale) * 40)  # scores round in proportion to their size
    assert numerics.relative_error(out, truth) <= 8 * eps
    torch.testing.assert_close(lse.double(), truth_lse, rtol=1e-5, atol=1e-5 + 40 * abs(scale) * 1e-6)
    grads = [memory.empty((1, tokens, 2, 16), dtype) for _ in range(3)]
    run(memory, "attention_backward", grad, q, k, v, out, lse, scale, *norm, *grads)
    truths, eager = ([torch.empty_like(t) for t in ts] for ts in (wide[:3], (q, k, v)))
    wide_grad = grad.double()
    call("attention_backward", "reference", wide_grad, *wide[:3], truth, truth_lse, scale, *wide[3:], *truths)
    forward = call("attention", "reference", q, k, v, scale, *norm)
    call("attention_backward", "reference", grad, q, k, v, *forward, scale, *norm, *eager)
    for actual, expected, plain in zip(grads, truths, eager, strict=True):
        if expected.norm() > 1e-3 * wide_grad.norm():
            # where P is all but one-hot, what is left of a gradient is small beside its terms: eager loses it too
            error, eager_error = ((t.double() - expected).norm() for t in (actual, plain))
            assert error <= 64 * eps * expected.norm() + 4 * eager_error
