"""What every op without a backward keeps on every backend here, from its spec."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from internvit.numerics import DISTRIBUTIONS
from internvit.ops.backends.registry import backends_for
from internvit.ops.core.spec import (
    INFERENCE_SPECS,
    TINY,
    Arguments,
    Inputs,
    OpSpec,
    Size,
    batched,
    differentiable,
    first_images,
)

ROWS = ("x_q", "x_scale", "x_zero", "mean", "rstd")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
CASES = [
    (spec, variant, backend)
    for spec in INFERENCE_SPECS.values()
    for backend in backends_for(spec.op, "cpu", torch.float32)
    for variant in spec.examples
]
each_case = pytest.mark.parametrize(
    ("spec", "variant", "backend"), CASES, ids=[f"{s.name}-{v}-{b}" if v else f"{s.name}-{b}" for s, v, b in CASES]
)


def bits(t: Tensor) -> Tensor:
    """torch.equal knows no float8."""
    return t.view(torch.int8) if t.dtype == torch.float8_e4m3fn else t


def comparable(t: Tensor) -> Tensor:
    """`bits`, with a number for NaN, which is not equal to itself."""
    return torch.where(t.isnan(), -1.0, t) if t.dtype == torch.float32 else bits(t)


def equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(comparable(a), comparable(e)) for a, e in zip(actual, expected, strict=True))


def strided(t: Any) -> Any:
    if not isinstance(t, Tensor):
        return t
    return bits(t).repeat_interleave(2, -1)[..., ::2].view(t.dtype) if t.dim() else t


def registered(spec: OpSpec, arguments: Arguments) -> tuple[Any, tuple[Any, ...]]:
    """The op as torch knows it, and its arguments without the backend."""
    op = getattr(torch.ops.internvit, spec.op).default
    defaults = {n: p.default for n, p in inspect.signature(spec.function).parameters.items()}
    return op, tuple((defaults | arguments)[a.name] for a in op._schema.arguments[:-1])


@each_case
def test_dtypes_layouts_and_batches(spec: OpSpec, variant: str, backend: str, generator: torch.Generator) -> None:
    arguments = spec.examples[variant](Inputs(TINY, generator))
    outputs = spec.run(arguments, backend)
    for ours, reference in zip(outputs, spec.run(arguments, "reference"), strict=True):
        assert ours.dtype == reference.dtype
        assert ours.shape == reference.shape
        assert ours.is_contiguous()
    assert equal(spec.run(arguments, backend), outputs)
    assert equal(spec.run({n: strided(t) for n, t in arguments.items()}, backend), outputs)
    rows = [n for n in ROWS if arguments.get(n) is not None]
    for images in (0, 1) if rows or batched(arguments) else ():  # a weight's fold has no images
        fewer = spec.run(first_images(arguments, images) | {n: arguments[n][:images] for n in rows}, backend)
        packed = "cu_seqlens" in arguments
        tokens = int(arguments["cu_seqlens"][images]) if packed else 0
        assert equal(fewer, tuple(t[..., :tokens] if packed else t[:images] for t in outputs))


@pytest.mark.sampled(3)
@each_case
def test_opcheck_and_compile(spec: OpSpec, variant: str, backend: str, generator: torch.Generator) -> None:
    arguments = spec.examples[variant](Inputs(TINY, generator))
    op, values = registered(spec, arguments)
    before = [v.clone() for v in values if isinstance(v, Tensor)]
    float8 = any(t.dtype == torch.float8_e4m3fn for t in before)
    # torch's check of what an op writes to has no comparison of float8: what it reads is compared here.
    torch.library.opcheck(op, (*values, backend), test_utils=OPCHECKS[float8:])
    assert equal(tuple(before), tuple(v for v in values if isinstance(v, Tensor)))
    torch._dynamo.reset()
    compiled = torch.compile(lambda: spec.run(arguments, backend), fullgraph=True, backend="aot_eager")()
    assert equal(compiled, spec.run(arguments, backend))


@pytest.mark.sampled(3)
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_contract(spec: OpSpec, variant: str, backend: str, dtype: torch.dtype, generator) -> None:
    """On every distribution, at widths that vectors divide and do not."""
    for distribution in DISTRIBUTIONS:
        for size in (Size(2, 3, 2, 20), Size(1, 5, 3, 64), Size(1, 2, 1, 3)):
            arguments = spec.examples[variant](Inputs(size, generator, dtype, distribution=distribution))
            outputs = spec.run(arguments, backend)
            assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs), (distribution, size)


@pytest.mark.parametrize("spec", INFERENCE_SPECS.values(), ids=lambda spec: spec.name)
def test_differentiating_is_a_clear_error(spec: OpSpec) -> None:
    arguments = next(iter(spec.examples.values()))(Inputs(TINY))
    leaves = {n: t.requires_grad_() for n, t in differentiable(arguments).items() if t.is_floating_point()}
    outputs = [t for t in spec.run(arguments | leaves, "reference") if t.requires_grad]
    with pytest.raises(RuntimeError, match="has no derivative"):
        sum(t.float().sum() for t in outputs).backward()
