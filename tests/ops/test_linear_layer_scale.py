import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import product_violations, relative_error, sample
from tests.ops.cases import backends_here
from tests.ops.shapes import in_draws, pooled

backends = pytest.mark.parametrize("backend", backends_here("linear_layer_scale"))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def parameters(out: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> list[torch.Tensor]:
    """weight, bias and a gamma of both signs, from 0.02 to 0.2 in magnitude."""
    weight, bias = sample((out, width), "normal", dtype, generator) / 8, sample((out,), "normal", dtype, generator)
    gamma = torch.linspace(0.02, 0.2, out) * torch.linspace(-1, 1, out).sign()
    return [weight, bias, gamma.to(dtype)]


@backends
@dtypes
@pytest.mark.parametrize(("rows", "width", "out"), [(1, 40, 24), (257, 384, 96), (65, 4096, 1024)])
def test_contract(backend, dtype, rows, width, out, generator) -> None:
    x = sample((2, pooled(rows), width), "normal", dtype, generator)
    weight, bias, gamma = parameters(out, width, dtype, generator)
    parts = in_draws(x, rows, 1)
    y = torch.cat([ops.linear_layer_scale(part, weight, gamma, bias, backend=backend) for part in parts], 1)
    truth = F.linear(x.double(), weight.double(), bias.double()) * gamma.double()
    # The operands that are rounded are the folded ones.
    folded, folded_bias = (weight * gamma[:, None]).double(), (bias * gamma).double()
    emulation = F.linear(x, weight, bias) * gamma
    if dtype != torch.float32:
        emulation = F.linear(x.double(), folded, folded_bias).to(dtype)
    assert product_violations(y, truth, emulation) == []


@backends
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 5e-3)], ids=str)
def test_gradients_are_those_of_a_linear_and_layer_scale(backend, with_bias, dtype, bound, generator) -> None:
    x = sample((2, 129, 384), "normal", dtype, generator)
    weight, bias, gamma = parameters(1030, 384, dtype, generator)  # more rows than one piece
    leaves = [t.requires_grad_() for t in (x, weight, *([bias] if with_bias else []), gamma)]
    grad = sample((2, 129, 1030), "normal", dtype, generator)
    y = ops.linear_layer_scale(x, weight, gamma, bias if with_bias else None, backend=backend)
    actual = torch.autograd.grad(y, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(F.linear(*wide[:-1]) * wide[-1], wide, grad.double())
    for a, t, leaf in zip(actual, truth, leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a, t) < bound


@backends
def test_a_float32_residual_keeps_its_precision_and_gradient(backend, generator) -> None:
    """y is float32 then; x's gradient, and the folded weight's, are products in x's dtype."""
    x = sample((2, 17, 40), "normal", torch.bfloat16, generator).requires_grad_()
    weight, bias, gamma = (t.requires_grad_() for t in parameters(24, 40, torch.bfloat16, generator))
    residual = (1e-3 * sample((2, 17, 24), "normal", torch.float32, generator)).requires_grad_()
    grad = sample((2, 17, 24), "normal", torch.float32, generator)
    leaves = (x, weight, bias, gamma, residual)
    y = ops.linear_layer_scale(x, weight, gamma, bias, residual, backend=backend)
    assert y.dtype == torch.float32
    branch = ops.linear_layer_scale(x, weight, gamma, bias, torch.zeros_like(residual), backend=backend)
    torch.testing.assert_close(y - branch, residual, rtol=1e-3, atol=1e-6)
    actual = torch.autograd.grad(y, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.autograd.grad(F.linear(*wide[:3]) * wide[3] + wide[4], wide, grad.double())
    assert torch.equal(actual[4], grad)
    for a, t, leaf in zip(actual, truth, leaves, strict=True):
        assert a.dtype == leaf.dtype
        assert relative_error(a, t) < 5e-3


@backends
def test_the_folded_weight_is_not_kept(backend) -> None:
    x, weight = torch.randn(3, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    gamma = torch.full((64,), 0.1, requires_grad=True)
    made = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made.append((StorageWeakRef(out.untyped_storage()), out.untyped_storage().nbytes()))
            return out

    from internvit.ops.linear_layer_scale import linear_layer_scale_reference

    with Record():
        linear_layer_scale_reference(x.detach(), weight.detach(), None, gamma.detach(), None)
    assert max(n for _, n in made) == weight.nbytes, "the folded weight is made inside"
    y = ops.linear_layer_scale(x, weight, gamma, None, backend=backend)
    kept = [t for t in y.grad_fn.saved_tensors if t is not None]
    gc.collect()
    assert sorted(t.data_ptr() for t in kept) == sorted(t.data_ptr() for t in (x, weight, gamma))


@backends
def test_autocast_rounds_the_folded_weight_once(backend, generator) -> None:
    x = sample((3, 40), "normal", torch.float32, generator).requires_grad_()
    weight, bias, gamma = (t.requires_grad_() for t in parameters(24, 40, torch.float32, generator))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear_layer_scale(x, weight, gamma, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    folded, folded_bias = (weight * gamma[:, None]).bfloat16(), (bias * gamma).bfloat16()
    assert torch.equal(y, F.linear(x.bfloat16(), folded, folded_bias))
    y.sum().backward()
    assert {t.grad.dtype for t in (x, weight, bias, gamma)} == {torch.float32}


@backends
def test_float16_is_refused_where_the_folded_weight_underflows(backend) -> None:
    x, gamma = torch.ones(2, 8).half(), torch.full((4,), 0.1).half()
    normal = torch.full((4, 8), 0.02).half()
    assert torch.isfinite(ops.linear_layer_scale(x, normal, gamma, None, backend=backend)).all()
    small = normal.clone()
    small[1, 2] = 2e-4  # normal itself, 2e-5 once folded
    with pytest.raises(ValueError, match="leaves float16's normal range"):
        ops.linear_layer_scale(x, small, gamma, None, backend=backend)
    gone = normal.clone()
    gone[0, 0] = 7e-5
    with pytest.raises(ValueError, match="leaves float16's normal range"):
        ops.linear_layer_scale(x, gone, torch.full((4,), 1e-4).half(), None, backend=backend)  # 0 in float16
    with pytest.raises(ValueError, match="leaves float16's normal range"):
        ops.linear_layer_scale(x, torch.full((4, 8), 1e3).half(), torch.full((4,), 1e3).half(), None, backend=backend)
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(ValueError, match="float16"):
        ops.linear_layer_scale(x.float(), small.float(), gamma.float(), None, backend=backend)
    assert torch.isfinite(ops.linear_layer_scale(x.bfloat16(), small.bfloat16(), gamma.bfloat16(), None)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.ones(4, 7)), r"weight must have shape \[M, 8\] \(x's last dimension\), got \[4, 7\]"),
        (dict(bias=torch.ones(5)), r"bias must have shape \[4\] \(weight's rows\), got \[5\]"),
        (dict(gamma=torch.ones(8)), r"gamma must have shape \[4\] \(weight's rows\), got \[8\]"),
        (dict(weight=torch.ones(4, 8).double()), "weight must have x's dtype torch.float32 or be torch.float32"),
        (dict(gamma=torch.ones(4).bfloat16()), "gamma must have x's dtype torch.float32 or be torch.float32"),
        (dict(residual=torch.ones(4)), r"residual must have shape \[2, 4\], got \[4\]"),
        (dict(residual=torch.ones(2, 4).half()), "residual must have x's dtype torch.float32 or be torch.float32, got"),
        (dict(bias=torch.ones(4).double()), "bias must have weight's dtype torch.float32, got torch.float64"),
    ],
)
def test_bad_input(change, message) -> None:
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(4, 8), "bias": torch.ones(4), "gamma": torch.ones(4)}
    with pytest.raises(ValueError, match=message):
        ops.linear_layer_scale(**{**arguments, **change})
