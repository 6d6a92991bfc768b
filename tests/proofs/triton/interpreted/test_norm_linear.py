"""Norms inside GEMMs: the ops of their own contracts, on every distribution, and whole models."""

import pytest
import torch

import internvit
from internvit.kernels import norm_linear as kernels
from internvit.numerics import DISTRIBUTIONS
from internvit.ops.core.spec import INFERENCE_SPECS, Inputs, Size, as_tuple
from tests.ops.test_inference_ops import registered
from tests.proofs.triton.interpreted.harness import DTYPES, Memory, run

BACKENDS = {"fold_norm": "triton", "norm_linear": "triton_gemm", "norm_qkv": "triton_gemm"}
BACKENDS["linear_residual_stats"] = "triton_gemm"
SIZES = (Size(2, 3, 2, 20), Size(1, 67, 3, 64), Size(1, 2, 1, 3))
CASES = [(name, variant) for name in BACKENDS for variant in INFERENCE_SPECS[name].examples]


DATA = [
    pytest.param(
        dtype, distribution, marks=() if dtype == "bfloat16" or distribution == "large_mean" else pytest.mark.slow
    )
    for dtype in DTYPES
    for distribution in DISTRIBUTIONS
]


@pytest.mark.parametrize(("dtype", "distribution"), DATA)
@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{n}-{v}" for n, v in CASES])
def test_the_contract(name, variant, dtype, distribution, generator):
    spec = INFERENCE_SPECS[name]
    for size in SIZES if distribution in ("normal", "large_mean") else SIZES[::2]:
        arguments = spec.examples[variant](Inputs(size, generator, getattr(torch, dtype), distribution=distribution))
        memory = Memory()
        placed = {n: memory.place(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
        outputs = run(memory, name, *registered(spec, placed)[1], backend=BACKENDS[name])
        assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs), size
        for ours, reference in zip(outputs, spec.run(arguments, "reference"), strict=True):
            assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype)


@pytest.mark.parametrize(("name", "variant"), [c for c in CASES if c[0] != "fold_norm"])
def test_layouts_and_batches(name, variant, generator):
    """Strided and empty inputs; an image has the same bits at another place of other tiles."""
    spec, backend = INFERENCE_SPECS[name], BACKENDS[name]
    arguments = spec.examples[variant](Inputs(Size(3, 50, 2, 20), generator, torch.bfloat16))
    whole = spec.run(arguments, backend)
    strided = {n: twice(t) if isinstance(t, torch.Tensor) else t for n, t in arguments.items()}
    for a, b in zip(spec.run(strided, backend), whole, strict=True):
        assert torch.equal(a, b)
    batched = [n for n in ("x", "residual", "mean", "rstd") if arguments.get(n) is not None]
    for images in (slice(0, 0), slice(1, 2)):
        some = spec.run(arguments | {n: arguments[n][images] for n in batched}, backend)
        for a, b in zip(some, whole, strict=True):
            assert torch.equal(a, b[images])


def twice(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def test_columns_of_two_parts_in_a_tile_are_read_again(generator, monkeypatch):
    """A width that tiles do not divide: QK-norm's statistics are those of a pass of their own."""
    spec, read = INFERENCE_SPECS["norm_qkv"], []
    seen = kernels.project_qkv
    monkeypatch.setattr(kernels, "_add_pieces", lambda *args: read.append(args))
    arguments = spec.examples["rms_norm"](Inputs(Size(1, 5, 2, 20), generator, torch.bfloat16))
    assert seen(*registered(spec, arguments)[1]) is None
    spec.run(arguments, "triton_gemm")
    assert not read


def test_an_eps_that_hides_nothing_is_refused_or_read_again(generator):
    arguments = INFERENCE_SPECS["linear_residual_stats"].examples["rms_norm"](Inputs(SIZES[0], generator))
    with pytest.raises(ValueError, match=r"linear_residual_stats: eps must be at least 1e-29 .*, got 0"):
        internvit.ops.linear_residual_stats(**arguments, eps=0.0, backend="triton_gemm")
    spec = INFERENCE_SPECS["norm_qkv"]
    arguments = spec.examples["rms_norm"](Inputs(SIZES[1], generator)) | {"eps": 0.0}
    outputs = spec.run(arguments, "triton_gemm")
    assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs)


def test_compiled_graphs_keep_the_backend(generator):
    for name, variant in CASES:
        spec, backend = INFERENCE_SPECS[name], BACKENDS[name]
        arguments = spec.examples[variant](Inputs(SIZES[0], generator))
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda s=spec, a=arguments, b=backend: s.run(a, b), fullgraph=True, backend="aot_eager"
        )
        for a, b in zip(as_tuple(compiled()), spec.run(arguments, backend), strict=True):
            assert torch.equal(a, b)
