import pytest
import torch
from torch.nn import functional as F

from internvit import ops
from internvit.numerics import layer_norm_terms, norm_violations, sample
from tests.ops.cases import backends_here
from tests.ops.shapes import check_gradients, in_draws, mean_over_std, norm_shapes, pooled

backends = pytest.mark.parametrize("backend", backends_here("layer_scale_residual_norm"))
kinds = pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])


def arguments(
    rows: int, width: int, norm_type: str, dtype: torch.dtype, generator, distribution: str = "normal"
) -> dict:
    return dict(
        residual=sample((2, rows, width), distribution, dtype, generator),
        branch=sample((2, rows, width), "normal", dtype, generator),
        gamma=sample((width,), "normal", dtype, generator),
        row_scale=torch.tensor([1.25, 0.0]),
        weight=sample((width,), "normal", dtype, generator),
        bias=sample((width,), "normal", dtype, generator) if norm_type == "layer_norm" else None,
    )


def norm_of(x, weight, bias, norm_type: str):
    if norm_type == "rms_norm":
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-6)


@pytest.mark.sampled(8)
@backends
@kinds
@norm_shapes
def test_contract_and_same_bits_as_two_ops(backend, norm_type, rows, width, distribution, dtype, generator) -> None:
    a = arguments(pooled(rows), width, norm_type, dtype, generator, distribution)
    parts = zip(in_draws(a["residual"], rows, 1), in_draws(a["branch"], rows, 1), strict=True)
    draws = [{**a, "residual": residual, "branch": branch} for residual, branch in parts]
    results = [ops.layer_scale_residual_norm(**draw, norm_type=norm_type, backend=backend) for draw in draws]
    out, normed = (torch.cat(tensors, 1) for tensors in zip(*results, strict=True))
    alone = ops.layer_scale_residual(a["residual"], a["branch"], a["gamma"], a["row_scale"], backend=backend)
    assert torch.equal(out, alone)
    # The norm's truth is taken of the rounded residual, as its statistics are.
    wide = [None if t is None else t.double() for t in (a["weight"], a["bias"])]
    truth, eager = norm_of(out.double(), *wide, norm_type), norm_of(out, a["weight"], a["bias"], norm_type)
    if norm_type == "rms_norm":
        assert norm_violations(normed, truth, eager) == []
        assert torch.equal(normed, ops.rms_norm(out, a["weight"], backend=backend))
    else:
        magnitude = layer_norm_terms(out, a["weight"], a["bias"])
        assert norm_violations(normed, truth, eager, magnitude, mean_over_std(out)) == []
        assert torch.equal(normed, ops.layer_norm(out, a["weight"], a["bias"], backend=backend))


@backends
@kinds
@pytest.mark.parametrize("rounding", ["fused", "reference"])
def test_float32_residual_stream(backend, norm_type, rounding, generator) -> None:
    a = arguments(17, 384, norm_type, torch.bfloat16, generator)
    a["residual"] = a["residual"].float()
    out, normed = ops.layer_scale_residual_norm(**a, norm_type=norm_type, rounding=rounding, backend=backend)
    assert (out.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    two_ops = (
        ops.rms_norm(out, a["weight"], rounding=rounding, backend=backend)
        if norm_type == "rms_norm"
        else ops.layer_norm(out, a["weight"], a["bias"], backend=backend)
    )
    assert torch.equal(normed, two_ops.bfloat16())


@backends
@kinds
def test_gradients_at_true_width_through_both_outputs(backend, norm_type, generator) -> None:
    def chain(x: dict) -> tuple:
        out = x["residual"] + x["row_scale"].to(x["branch"].dtype).view(-1, 1, 1) * x["gamma"] * x["branch"]
        return out, norm_of(out, x["weight"], x["bias"], norm_type)

    def fused(x: dict) -> tuple:
        return ops.layer_scale_residual_norm(**x, norm_type=norm_type, backend=backend)

    def draw() -> list:
        a = arguments(33, 1024, norm_type, torch.float32, generator, "massive")
        names = [n for n, t in a.items() if t is not None and n != "row_scale"]
        grads = [sample((2, 33, 1024), "normal", torch.float32, generator) for _ in range(2)]
        ways = []
        for function, dtype in ((fused, torch.float32), (chain, torch.float64), (chain, torch.float32)):
            x = {n: t.to(dtype).requires_grad_(n in names) if t is not None else None for n, t in a.items()}
            ways.append(torch.autograd.grad(function(x), [x[n] for n in names], [g.to(dtype) for g in grads]))
        return ways

    check_gradients(draw)


@backends
def test_only_one_output_used(backend, generator) -> None:
    a = arguments(3, 40, "rms_norm", torch.float64 if backend == "reference" else torch.float32, generator)
    leaves = {n: t.requires_grad_(n != "row_scale") for n, t in a.items() if t is not None}
    out, normed = ops.layer_scale_residual_norm(**leaves, backend=backend)
    terms = [leaves[n] for n in ("residual", "branch", "gamma", "row_scale")]
    alone, again = (ops.layer_scale_residual(*terms, backend=backend) for _ in range(2))
    wanted = torch.autograd.grad(alone.square().sum(), [leaves[n] for n in ("residual", "branch", "gamma")])
    got = torch.autograd.grad(
        out.square().sum(), [leaves[n] for n in ("residual", "branch", "gamma")], retain_graph=True
    )
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y)
    by_norm = torch.autograd.grad(
        ops.rms_norm(again, leaves["weight"], backend=backend).square().sum(), leaves["gamma"]
    )
    torch.testing.assert_close(torch.autograd.grad(normed.square().sum(), leaves["gamma"]), by_norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm_type="batch_norm"), "norm_type must be one of 'rms_norm', 'layer_norm', got 'batch_norm'"),
        (dict(bias=torch.ones(8)), "bias must be None for norm_type='rms_norm'"),
        (dict(weight=torch.ones(9)), r"weight must have shape \[8\] \(residual's last dimension\), got \[9\]"),
    ],
)
def test_bad_input(change, message) -> None:
    x = torch.ones(2, 3, 8)
    with pytest.raises(ValueError, match=message):
        ops.layer_scale_residual_norm(
            **{"residual": x, "branch": x, "gamma": None, "row_scale": None, "weight": torch.ones(8), **change}
        )
