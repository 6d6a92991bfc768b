"""Attention's maximum is taken of raw scores and scaled: negative scales, zero and large scores keep their softmax."""

import pytest
import torch

from tests.proofs.triton.interpreted.harness import Memory, run
from tests.proofs.triton.interpreted.test_qk_norm import statistics
from tests.support.implementations import call


def rounding(q, k, v, grad, scale, norm):
    """Bounds in float64 on the errors of out, lse, grad_q, grad_k, grad_v, element by element, to first order.

    A score is D products, their sum, and at most 8 more roundings (QK-norm's factors, the scale, base 2): off by
    e = (D + 8) eps / 2 * sum |q k| |scale|. Normalised, a probability is off by what its own e differs from its row's:
    nothing where the softmax is one-hot. Backward's exp(S - lse) is also off by what lse is off, 4 eps / 2 of the
    largest score, and by as much again for S, lse in base 2 and their difference; it is 0 below float32's smallest
    normal number.
    """
    D, N, eps = q.shape[-1], q.shape[1], torch.finfo(torch.float32).eps
    q, k, v, grad = (t.double().transpose(1, 2) for t in (q, k, v, grad))
    left = right = torch.ones(1, dtype=torch.float64)
    if norm[0] is not None:
        weights = [w.double().view(q.shape[1], 1, D) for w in norm[:2]]
        left, right = (r.double()[:, None, :, None] * w for r, w in zip(norm[2:], weights, strict=True))
        q, k = q * left, k * right
    scores = q @ k.transpose(-1, -2) * scale
    p, tiny = scores.softmax(-1), torch.finfo(torch.float32).tiny
    e = (D + 8) * eps / 2 * abs(scale) * (q.abs() @ k.abs().transpose(-1, -2))
    row = (p * e).sum(-1, keepdim=True)
    normalised = (1 - p) * e + (row - p * e) + N * eps  # relative, of P in forward
    off = normalised + 4 * eps * scores.abs().amax(-1, keepdim=True)  # in backward
    products = grad.abs() @ v.abs().transpose(-1, -2)
    centred = grad @ v.transpose(-1, -2)
    centred = (centred - (p * centred).sum(-1, keepdim=True)).abs()
    delta = (p * products * (normalised + D * eps)).sum(-1, keepdim=True)
    inner = p * (centred * (off + N * eps) + D * eps * products + delta) + tiny * products  # of dS / scale
    inner = inner * abs(scale)
    sums = p * (off + N * eps) + tiny
    bounds = (
        (p * normalised + tiny) @ v.abs(),
        inner @ k.abs() * left.abs(),
        inner.transpose(-1, -2) @ q.abs() * right.abs(),
        sums.transpose(-1, -2) @ grad.abs(),
    )
    out, *grads = (b.transpose(1, 2) for b in bounds)
    lse = row.squeeze(-1) + N * eps + 2 * eps * scores.abs().amax(-1)
    return out, lse, grads


@pytest.mark.sampled(6)
@pytest.mark.parametrize("tokens", [17, 33, 40])  # one more than whole tiles, and a masked tail
@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.3, 300.0, -300.0])
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "QK-norm"])
def test_scales_of_any_sign(tokens, scale, folded, generator):
    for _ in range(4):
        memory, dtype = Memory(), torch.float32
        q, k, v, grad = (memory.place(torch.randn(1, tokens, 2, 16, generator=generator)) for _ in range(4))
        norm = (None,) * 4
        if folded:
            weights = (memory.place(1 + 0.1 * torch.randn(32, generator=generator)) for _ in range(2))
            norm = (*weights, *(memory.place(t) for t in statistics(memory, q, k)))
        out, lse = run(memory, "attention", q, k, v, scale, *norm)
        wide = [None if t is None else t.double() for t in (q, k, v, *norm)]
        truth, truth_lse = call("attention", "reference", *wide[:3], scale, *wide[3:])
        out_bound, lse_bound, bounds = rounding(q, k, v, grad, scale, norm)
        assert ((out - truth).abs() <= out_bound).all()
        assert ((lse - truth_lse).abs() <= lse_bound).all()
        grads = [memory.empty((1, tokens, 2, 16), dtype) for _ in range(3)]
        run(memory, "attention_backward", grad, q, k, v, out, lse, scale, *norm, *grads)
        truths = [torch.empty_like(t) for t in wide[:3]]
        call("attention_backward", "reference", grad.double(), *wide[:3], truth, truth_lse, scale, *wide[3:], *truths)
        for actual, expected, bound in zip(grads, truths, bounds, strict=True):
            assert ((actual - expected).abs() <= bound).all(), ((actual - expected).abs() / bound).max()
