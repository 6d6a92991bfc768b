import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import product_violations, relative_error, sample
from internvit.ops.attention import SavedAttention, attention_backward_reference, attention_reference
from internvit.ops.backends import sdpa
from internvit.ops.backends.registry import BACKENDS
from tests.ops.cases import backends_here

backends = pytest.mark.parametrize("backend", backends_here("attention"))
SHAPES = [(1, 1, 8), (3, 2, 64), (257, 2, 88), (1025, 1, 128), (577, 2, 64)]  # tokens, heads, head_dim
shapes = pytest.mark.parametrize(("tokens", "heads", "head_dim"), SHAPES)


def qkv(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, generator, batch: int = 2) -> torch.Tensor:
    return sample((batch, tokens, 3, heads, head_dim), "normal", dtype, generator)


def attend(q, k, v, scale: float) -> torch.Tensor:
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


def emulate(q, k, v, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """float64 with only the unnormalised probabilities and the output rounded to dtype."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    out = torch.einsum("bhij,bjhd->bihd", p.to(dtype).double(), v) / p.sum(-1).transpose(1, 2).unsqueeze(-1)
    return out.to(dtype)


@pytest.mark.sampled(2)
@backends
@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_contract_on_packed_views(backend, tokens, heads, head_dim, dtype, generator) -> None:
    # Few elements scatter: of three tokens one draw in 500 comes to 0.9 of the bound.
    q, k, v = qkv(tokens, heads, head_dim, dtype, generator, batch=max(2, 64 // tokens)).unbind(2)
    out = ops.attention(q, k, v, backend=backend)
    assert out.is_contiguous()
    scale = head_dim**-0.5
    truth = attend(q.double(), k.double(), v.double(), scale)
    if dtype == torch.float32:
        emulation = attend(q, k, v, scale)
    else:
        emulation = emulate(q.double(), k.double(), v.double(), scale, dtype)
    assert product_violations(out, truth, emulation) == []


@pytest.mark.parametrize("backend", [b for b in backends_here("attention") if BACKENDS[b].exposes_lse_on("cpu")])
def test_log_sum_exp(backend, generator) -> None:
    q, k, v = qkv(17, 2, 64, torch.float32, generator).unbind(2)
    lse = torch.ops.internvit.attention(q, k, v, 0.125, *[None] * 8, backend)[1]
    truth = (torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 0.125).logsumexp(-1)
    assert relative_error(lse, truth) < 1e-6


@backends
@shapes
def test_gradients(backend, tokens, heads, head_dim, generator) -> None:
    tensors = [
        t.contiguous().requires_grad_() for t in qkv(tokens, heads, head_dim, torch.float32, generator).unbind(2)
    ]
    grad = sample((2, tokens, heads, head_dim), "normal", torch.float32, generator)
    actual = torch.autograd.grad(ops.attention(*tensors, backend=backend), tensors, grad)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(attend(*wide, head_dim**-0.5), wide, grad.double())
    for a, t in zip(actual, truth, strict=True):
        assert (t == 0).all() or relative_error(a, t) < 3e-6


@backends
def test_large_scores_stay_finite(backend, generator) -> None:
    q, k, v = (100 * t for t in qkv(33, 1, 64, torch.bfloat16, generator).unbind(2))
    out = ops.attention(q, k, v, scale=1.0, backend=backend)
    assert relative_error(out, attend(q.double(), k.double(), v.double(), 1.0)) < 0.02


def test_sdpa_backward_where_no_log_sum_exp_is_exposed(monkeypatch, generator) -> None:
    tensors = [t.contiguous().requires_grad_() for t in qkv(9, 2, 8, torch.float64, generator).unbind(2)]
    expected = torch.autograd.grad(ops.attention(*tensors, backend="reference").square().sum(), tensors)
    monkeypatch.setattr("internvit.ops.backends.sdpa._kernels", lambda *_: sdpa._PLAIN)
    actual = torch.autograd.grad(ops.attention(*tensors, backend="sdpa").square().sum(), tensors)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_agrees_with_torch_at_true_size(generator) -> None:
    q, k, v = qkv(1025, 16, 64, torch.bfloat16, generator, batch=1).unbind(2)
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    assert relative_error(ops.attention(q, k, v), expected) < 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.ones(2, 3, 8)), r"q must have shape \[B, N, H, D\], got \[2, 3, 8\]"),
        (dict(k=torch.ones(2, 4, 2, 8)), r"v must have k's shape \[2, 4, 2, 8\], got \[2, 3, 2, 8\]"),
        (dict(v=torch.ones(2, 3, 2, 8).half()), "v must have q's dtype torch.float32, got torch.float16"),
        (dict(q_weight=torch.ones(16)), "go together, got None for k_weight, rstd_q, rstd_k"),
        (dict(backend="flash"), "flash"),
        (
            dict(q_weight=torch.ones(15), k_weight=torch.ones(16), rstd_q=torch.ones(2, 3), rstd_k=torch.ones(2, 3)),
            r"q_weight must have shape \[16\]",
        ),
        (
            dict(q_weight=torch.ones(16), k_weight=torch.ones(16), rstd_q=torch.ones(2, 4), rstd_k=torch.ones(2, 3)),
            r"rstd_q must have shape \[2, 3\] \(q's \[B, N\]\), got \[2, 4\]",
        ),
        (
            dict(
                q_weight=torch.ones(16),
                k_weight=torch.ones(16),
                rstd_q=torch.ones(2, 3),
                rstd_k=torch.ones(2, 3),
                backend="sdpa",
            ),
            "its attention has no QK-norm inside",
        ),
    ],
)
def test_bad_input(change, message) -> None:
    heads = {n: torch.ones(2, 3, 2, 8) for n in "qkv"}
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.attention(**{**heads, **change})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e17, 1e30])
def test_the_reference_is_normalised_for_any_scores(dtype: torch.dtype, size: float, generator) -> None:
    """exp(scores - lse) carries lse's rounding: of two equal keys at 1e8 in float32 each would get 1, not 1/2."""
    q, k = ((torch.randn(2, 10, 2, 8, generator=generator, dtype=dtype) * size**0.5) for _ in range(2))
    k[:, 1::2] = k[:, ::2]
    ones = torch.ones_like(q)
    out, lse = attention_reference(q, k, ones, 0.3, None)
    torch.testing.assert_close(out, ones)
    assert lse.isfinite().all()
    grads = [torch.empty_like(q) for _ in range(3)]
    attention_backward_reference(ones, SavedAttention(q, k, ones, out, lse, 0.3, None), grads)
    assert all(g.isfinite().all() for g in grads)
    torch.testing.assert_close(grads[2].sum(1), torch.full_like(grads[2].sum(1), 10))  # each query gives its 1 away
