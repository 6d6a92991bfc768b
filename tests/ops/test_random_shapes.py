"""Claims that hold for every shape and layout, on shapes and layouts that are drawn.

The kernels of backend `cpu`, and Linears whatever the backend, give an image the same bits alone and in any batch; the
former for any number of threads too. The rest is PyTorch's, whose bits depend on both: its vectorised functions compute
the end of a tensor, which is another one in each batch and for each thread, by scalar ones.
"""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from internvit.numerics import relative_error
from internvit.ops.core.spec import Arguments, Inputs, Size, batched
from internvit.ops.linear import linear
from tests.ops.cases import CASES_AND_BACKENDS, Case
from tests.support.layouts import LAYOUTS, laid_out

BATCH = 5
each_backend = pytest.mark.parametrize(
    ("case", "backend"), CASES_AND_BACKENDS, ids=[f"{c}-{b}" for c, b in CASES_AND_BACKENDS]
)
PROBLEMS = given(
    tokens=st.one_of(st.integers(1, 5), st.integers(1, 140)),
    heads=st.integers(1, 4),
    head_dim=st.one_of(st.sampled_from([8, 16, 24, 64]), st.integers(1, 72)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)


def examples(count: int) -> settings:
    return settings(max_examples=count, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(
    case: Case, backend: str, tokens: int, heads: int, head_dim: int, dtype: torch.dtype, layout: str, seed: int
) -> Arguments:
    assume(backend in case.backends(dtype, head_dim))
    generator = torch.Generator().manual_seed(seed)
    arguments = case.spec.examples[case.variant](Inputs(Size(BATCH, tokens, heads, head_dim), generator, dtype))
    data = [n for n in batched(arguments) if arguments[n].dim() > 2]
    return arguments | {n: laid_out(arguments[n], layout) for n in data}


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Twice the error against float64 that each of them is allowed in `test_every_op`."""
    bound = 2e-6 if actual.dtype == torch.float32 else 2 * torch.finfo(actual.dtype).eps
    assert relative_error(actual, expected) < 2 * bound


@pytest.mark.sampled(4)
@each_backend
@examples(12)
@PROBLEMS
def test_an_image_alone_in_a_batch_and_at_another_place(case: Case, backend: str, **problem) -> None:
    arguments = make(case, backend, **problem)
    names = batched(arguments)
    own = backend == "cpu" or case.spec.name == "linear_layer_scale"
    check = torch.testing.assert_close if own else assert_close
    exact = {"rtol": 0, "atol": 0} if own else {}

    def run(order: list[int] | slice) -> tuple[Tensor, ...]:
        # A list of images copies them, a slice has the batch's strides.
        return case.run(arguments | {n: arguments[n][order] for n in names}, backend)

    if "cu_seqlens" in arguments:
        return  # tests/ops/test_packed.py

    whole = run(slice(None))
    for order in (slice(0, 1), slice(2, 3), slice(1, 3), slice(4, 5), [3], [4, 0, 3, 1, 2]):
        for together, part in zip(whole, run(order), strict=True):
            check(part, together[order], **exact)


def forward_and_backward(case: Case, arguments: Arguments, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    leaves = {n: t.detach().requires_grad_() for n, t in case.tensors(arguments).items()}
    outputs = case.run(arguments | leaves, backend)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), [o.detach() + 0.5 for o in outputs])
    return [o.detach() for o in outputs], list(gradients)


@pytest.mark.sampled(4)
@each_backend
@examples(6)
@PROBLEMS
def test_any_number_of_threads_and_again(case: Case, backend: str, **problem) -> None:
    arguments = make(case, backend, **problem)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(forward_and_backward(case, arguments, backend))
    first, again, *others = results
    assert all(map(torch.equal, first[0] + first[1], again[0] + again[1]))
    for outputs, gradients in others:
        if backend == "cpu" and not case.spec.name.startswith("linear"):
            assert all(map(torch.equal, first[0] + first[1], outputs + gradients))
        else:
            for a, b in zip(first[0], outputs, strict=True):
                assert_close(a, b)


def gradient_tolerance(case: Case, dtype: torch.dtype, layout: str, **_: int) -> float:
    """What rounding leaves of the largest gradient; elements of another address are off by about 1.

    Between equal keys the softmax is flat and gradients of q and k are 0 but for rounding, which is the same in all
    rows of a pack whose tokens are one token repeated: their weights' gradients sum it up over the pack.
    """
    if dtype != torch.float32:
        return torch.finfo(dtype).eps
    return 1e-3 if case.variant == "cu_seqlens" and layout == "expanded" else 4e-6


@pytest.mark.sampled(2)
@each_backend
@examples(6)
@PROBLEMS
def test_every_layout_has_the_results_of_the_contiguous_one(case: Case, backend: str, **problem) -> None:
    """Same bits: a layout is a copy at most. Backend `sdpa` read past inputs whose head_dim is not contiguous."""
    arguments = make(case, backend, **problem)
    contiguous = arguments | {n: arguments[n].contiguous() for n in batched(arguments)}
    results = [forward_and_backward(case, a, backend) for a in (arguments, contiguous)]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        if backend == "cpu":
            assert torch.equal(a, b)
        else:
            assert_close(a, b)
    largest = max(g.double().norm().item() for g in results[1][1])
    bound = gradient_tolerance(case, **problem) * max(largest, 1.0)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        # float16's infinities are equal, and their difference is not a number.
        assert torch.where(a == b, 0.0, a.double() - b.double()).norm() <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linears_of_modules_under_autocast(layout: str, generator: torch.Generator) -> None:
    x = laid_out(torch.randn(BATCH, 11, 96, generator=generator), layout)
    weight, bias = torch.randn(80, 96, generator=generator), torch.randn(80, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = linear(x, weight, bias)
        assert whole.dtype == torch.bfloat16
        for image in (slice(0, 1), slice(2, 4)):
            assert torch.equal(linear(x[image], weight, bias), whole[image])
