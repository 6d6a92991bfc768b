import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import relative_error, sample
from tests.ops.cases import backends_here

backends = pytest.mark.parametrize("backend", backends_here("attention"))
roundings = pytest.mark.parametrize("rounding", ["fused", "reference"])


def truth_of(qkv, q_weight, k_weight, dtype=torch.float64) -> torch.Tensor:
    qkv, q_weight, k_weight = qkv.to(dtype), q_weight.to(dtype), k_weight.to(dtype)
    q, k, v = qkv.unbind(2)
    width = q.shape[2] * q.shape[3]
    q, k = (F.rms_norm(x.flatten(2), (width,), w, 1e-6).view(x.shape) for x, w in ((q, q_weight), (k, k_weight)))
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def upstream(qkv, q_weight, k_weight) -> torch.Tensor:
    """Upstream's sequence in the storage dtype, with its naive attention."""

    def norm(x, weight):
        wide = x.flatten(2).float()
        return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)).view(x.shape)

    q, k, v = (t.transpose(1, 2) for t in (norm(qkv[:, :, 0], q_weight), norm(qkv[:, :, 1], k_weight), qkv[:, :, 2]))
    return (((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.sampled(6)
@backends
@roundings
@pytest.mark.parametrize("distribution", ["normal", "massive", "near_zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_at_most_upstreams(backend, rounding, distribution, dtype, generator) -> None:
    # Massive channels' error is that of a few roundings, lucky or not: draws are pooled.
    errors = []
    for _ in range(16 if distribution == "massive" else 1):
        qkv = sample((1, 257, 3, 5 * 128), distribution, dtype, generator).view(1, 257, 3, 5, 128)
        q_weight, k_weight = (1 + 0.3 * sample((640,), "normal", dtype, generator) for _ in range(2))
        out = ops.qk_norm_attention_qkvpacked(qkv, q_weight, k_weight, rounding=rounding, backend=backend)
        truth = truth_of(qkv, q_weight, k_weight)
        errors.append((relative_error(out, truth), relative_error(upstream(qkv, q_weight, k_weight), truth)))
    error, allowed = (torch.tensor(e).norm().item() for e in zip(*errors, strict=True))
    print(f"{error / allowed:.3f} of upstream's error")
    assert error <= (2 * allowed if dtype == torch.float32 else 1.02 * allowed)


@backends
@roundings
def test_packed_and_separate_inputs_give_the_same_bits(backend, rounding, generator) -> None:
    qkv = sample((2, 33, 3, 2, 64), "normal", torch.float32, generator).requires_grad_()
    q, k, v = (t.detach().clone().requires_grad_() for t in qkv.unbind(2))
    q_weight, k_weight = (sample((128,), "normal", torch.float32, generator).requires_grad_() for _ in range(2))
    settings = {"rounding": rounding, "backend": backend}
    packed = ops.qk_norm_attention_qkvpacked(qkv, q_weight, k_weight, **settings)
    separate = ops.qk_norm_attention(q, k, v, q_weight, k_weight, **settings)
    assert torch.equal(packed, separate)
    grad = sample(tuple(packed.shape), "normal", torch.float32, generator)
    by_packed = torch.autograd.grad(packed, (qkv, q_weight, k_weight), grad)
    by_separate = torch.autograd.grad(separate, (q, k, v, q_weight, k_weight), grad)
    assert by_packed[0].is_contiguous()
    for a, b in zip((*by_packed[0].unbind(2), *by_packed[1:]), by_separate, strict=True):
        assert torch.equal(a, b)


@backends
@roundings
def test_gradients_at_25_heads(backend, rounding, generator) -> None:
    qkv = sample((1, 65, 3, 25, 128), "normal", torch.float32, generator).requires_grad_()
    weights = [(1 + 0.3 * sample((3200,), "normal", torch.float32, generator)).requires_grad_() for _ in range(2)]
    grad = sample((1, 65, 25, 128), "normal", torch.float32, generator)
    out = ops.qk_norm_attention_qkvpacked(qkv, *weights, rounding=rounding, backend=backend)
    actual = torch.autograd.grad(out, (qkv, *weights), grad)
    wide = [t.detach().double().requires_grad_() for t in (qkv, *weights)]
    truth = torch.autograd.grad(truth_of(*wide), wide, grad.double())
    eager = torch.autograd.grad(truth_of(qkv, *weights, dtype=torch.float32), (qkv, *weights), grad)
    for a, t, e in zip(actual, truth, eager, strict=True):
        assert relative_error(a, t) <= max(2 * relative_error(e, t), 5e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3, 2, 8),), r"qkv must have shape \[B, N, 3, H, D\], got \[2, 3, 2, 8\]"),
        ((torch.ones(2, 3, 3, 2, 8), torch.ones(16)), "q_weight and k_weight go together"),
        ((torch.ones(2, 3, 3, 2, 8), torch.ones(9), torch.ones(16)), r"q_weight must have shape \[16\]"),
    ],
)
def test_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        ops.qk_norm_attention_qkvpacked(*arguments)
