"""QK-norm and its statistics, forward and backward, by strides, against float64."""

import pytest
import torch

from internvit import numerics
from internvit.ops import qk_norm
from tests.proofs.triton.interpreted.harness import (
    DTYPES,
    Memory,
    addends,
    agree,
    check_statistics,
    generator,
    parametrize,
    reference,
    run,
)

LAYOUTS = ("packed", "separate", "heads_first", "without_class_token")
FACTORS = {
    "heads": ((5, 8), (6, 64), (16, 64), (25, 128), (4, 88), (3, 24)),
    "tokens": (1, 17, 257, 1025),
    "dtype": DTYPES,
    "distribution": numerics.DISTRIBUTIONS,
    "layout": LAYOUTS,
    "weights": ("same", "float32"),
}


def short(case):
    H, D = case.get("heads", (1, 1))
    return case.get("tokens", 1) * H * D < 600_000  # 1025 tokens of 25 x 128 take the interpreter 8 s


def statistics(memory, q, k):
    """rstd_q, rstd_k [B, N], the kernels' own."""
    return run(memory, "qk_norm_stats", q, k, 1e-6)


def heads(memory, case, batch, distribution, g):
    """q, k, v [B, N, H, D] in the layout asked for, in guarded memory."""
    (H, D), N, dtype = case["heads"], case["tokens"], getattr(torch, case["dtype"])
    values = numerics.sample((3, batch, N, H * D), distribution, dtype, g).view(3, batch, N, H, D)
    if case["layout"] == "packed":
        views = memory.empty((batch, N, 3, H, D), dtype).unbind(2)
    elif case["layout"] == "heads_first":
        views = [memory.empty((batch, H, N, D), dtype).transpose(1, 2) for _ in range(3)]
    elif case["layout"] == "without_class_token":
        views = [memory.empty((batch, N + 1, H, D), dtype)[:, 1:] for _ in range(3)]
    else:
        views = [memory.empty((batch, N, H, D), dtype) for _ in range(3)]
    return [view.copy_(value) for view, value in zip(views, values, strict=True)]


@parametrize(full=("heads", "tokens", "dtype", "distribution"), allowed=short, **FACTORS)
def test_qk_norm(case):
    g, memory = generator(case), Memory()
    batch = 1 if case["tokens"] == 1025 else 2
    (H, D), dtype = case["heads"], getattr(torch, case["dtype"])
    q, k, _ = heads(memory, case, batch, case["distribution"], g)
    weight_dtype = torch.float32 if case["weights"] == "float32" else dtype
    weights = [memory.place((1 + torch.randn(H * D, generator=g)).to(weight_dtype)) for _ in range(2)]

    rstd = statistics(memory, q, k)
    truth = reference("qk_norm_stats", torch.float64, q, k, 1e-6)
    for i in range(2):
        check_statistics(rstd[i : i + 1], truth[i : i + 1])

    inputs = (q, k, *weights, 1e-6, "fused")
    actual = run(memory, "qk_norm", *inputs)
    truth, eager = (reference("qk_norm", d, *inputs) for d in (torch.float64, torch.float32))
    agree("norm", "q_normed k_normed", actual[:2], truth[:2], eager[:2])
    assert torch.equal(actual[2], rstd[0])
    assert torch.equal(actual[3], rstd[1])

    grads = heads(memory, case, batch, "normal", g)[:2]
    mask = (True,) * 4
    rstds = truth[2:]
    actual = run(memory, "qk_norm_backward", *grads, q, k, *weights, *rstd, mask)  # its own statistics
    truth, eager = (
        reference("qk_norm_backward", d, *grads, q, k, *weights, *(s.to(d) for s in rstds), mask)
        for d in (torch.float64, torch.float32)
    )
    agree(
        "sum",
        "grad_q grad_k grad_q_weight grad_k_weight",
        actual,
        truth,
        eager,
        addends=addends(batch * case["tokens"], H * D),
        summed={
            f"grad_{name}_weight": grad.double() * x.double() * rstd[:, :, None, None]
            for name, grad, x, rstd in zip("qk", grads, (q, k), rstds, strict=True)
        },
    )


@parametrize(full=("heads", "tokens", "dtype", "distribution"), allowed=short, **FACTORS)
def test_statistics_backward_adds_in_place(case):
    g, memory = generator(case), Memory()
    batch = 1 if case["tokens"] == 1025 else 2
    q, k, _ = heads(memory, case, batch, case["distribution"], g)
    grads = heads(memory, case, batch, "normal", g)
    before = [t.clone() for t in grads]
    rstd = reference("qk_norm_stats", torch.float64, q, k, 1e-6)
    channels = q.shape[2] * q.shape[3]
    # as large as the row dots of a backward are: grad_rstd * rstd is about C
    grad_rstd = [torch.randn(r.shape, generator=g, dtype=torch.float64) * channels / r for r in rstd]
    statistics = [memory.place(t.float()) for t in (*grad_rstd, *rstd)]
    expected = []
    for dtype in (torch.float64, torch.float32):
        copies = [t.to(dtype) for t in before[:2]]
        reference("qk_norm_stats_backward", dtype, *statistics[:2], q, k, *statistics[2:], *(wide := copies))
        expected.append(wide)
    run(memory, "qk_norm_stats_backward", *statistics[:2], q, k, *statistics[2:], *grads[:2])
    agree("sum", "grad_q grad_k", tuple(grads[:2]), *map(tuple, expected))
    assert torch.equal(grads[2], before[2]), "v's gradient lies beside and must not be touched"


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 0, 5, 8)])
def test_no_tokens(shape):
    q, weight = torch.randn(shape, requires_grad=True), torch.randn(40, requires_grad=True)
    out = qk_norm(q, q, weight, weight, backend="triton")
    grads = torch.autograd.grad(out[0].sum() + out[1].sum(), (q, weight))
    assert grads[0].shape == q.shape
    assert torch.equal(grads[1], torch.zeros(40))
