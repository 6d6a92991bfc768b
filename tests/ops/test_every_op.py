"""What every op owes on every backend here, whatever it computes."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

import internvit
from internvit.numerics import relative_error
from internvit.ops.core.registration import LIBRARY
from internvit.ops.core.spec import INFERENCE_SPECS, Arguments, Size, converted, first_images
from tests.ops.cases import CASES, CASES_AND_BACKENDS, Case

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_backend = pytest.mark.parametrize(
    ("case", "backend"), CASES_AND_BACKENDS, ids=[f"{c}-{b}" for c, b in CASES_AND_BACKENDS]
)


def plain(t: Tensor) -> Tensor:
    return t


def strided(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t.repeat_interleave(2)[::2]


def leaves(case: Case, arguments: Arguments, dtype: torch.dtype, lay: Callable[[Tensor], Tensor] = plain) -> Arguments:
    arguments = converted(arguments, dtype)
    return arguments | {n: lay(t.clone()).requires_grad_() for n, t in case.tensors(arguments).items()}


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    return sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)


def gradients(case: Case, arguments: Arguments, backend: str) -> tuple[list[Tensor], list[Tensor]]:
    outputs = case.run(arguments, backend)
    return list(outputs), list(torch.autograd.grad(loss_of(outputs), list(case.tensors(arguments).values())))


def gradcheck(case: Case, generator: torch.Generator, **settings: bool) -> bool:
    arguments = leaves(case, case.make(generator), torch.float64)
    tensors = case.tensors(arguments)
    return torch.autograd.gradcheck(
        lambda *values: case.run(arguments | dict(zip(tensors, values, strict=True)), "reference"),
        tuple(tensors.values()),
        **settings,
    )


@each_case
def test_gradcheck_of_the_reference(case: Case, generator: torch.Generator) -> None:
    """Along random directions, as PyTorch checks its own ops: an element at a time takes 60 times as long."""
    assert gradcheck(case, generator, fast_mode=True)


@pytest.mark.slow
@each_case
def test_gradcheck_of_every_element(case: Case, generator: torch.Generator) -> None:
    assert gradcheck(case, generator)


@each_case
def test_the_formula_is_what_the_reference_computes(case: Case, generator: torch.Generator) -> None:
    arguments = case.make(generator)
    for actual, expected in zip(case.run(arguments, "reference"), case.spec.plain(arguments), strict=True):
        # Statistics and the rounding "reference" of QK-norm's steps are in float64 here, as everything is.
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def pooled_errors(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    generator: torch.Generator,
    lay: Callable[[Tensor], Tensor] = plain,
) -> list[float]:
    """One error an output and a gradient, over 8 draws. A draw alone has a long tail on the reference too: where a
    softmax is one-hot the gradients of q and k all but cancel (one draw in 300 is past 2e-6 in float32)."""
    draws = []
    for _ in range(8):
        made = case.make(generator)
        made = converted(converted(made, dtype), torch.float64)
        truth = gradients(case, leaves(case, made, torch.float64), "reference")
        actual = gradients(case, leaves(case, made, dtype, lay), backend)
        draws.append((actual[0] + actual[1], truth[0] + truth[1]))
    errors = []
    for every in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        assert all(a.shape == t.shape for a, t in every)
        errors.append(relative_error(*(torch.stack(tensors) for tensors in zip(*every, strict=True))))
    return errors


@each_backend
def test_float32_forward_and_backward_follow_float64(case: Case, backend: str, generator: torch.Generator) -> None:
    assert max(pooled_errors(case, backend, torch.float32, generator)) < 2e-6


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("case", "backend"), [pair for pair in CASES_AND_BACKENDS if pair[1] != "reference"], ids=str)
def test_sums_over_many_tokens_are_as_exact_as_pytorch(case: Case, backend: str, generator: torch.Generator) -> None:
    """The rounding of one chain of additions grows with its length: an image of 896 px has 4097 tokens."""
    size = Size(1 if case.spec.multiplies_matrices else 48, 4097, 1, 16)
    made = converted(converted(case.make(generator, size), torch.float32), torch.float64)
    weights = [torch.rand(o.shape, generator=generator, dtype=torch.float64) for o in case.run(made, "reference")]

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        arguments = leaves(case, made, dtype)
        outputs = case.run(arguments, backend)
        return [
            *outputs,
            *torch.autograd.grad(
                outputs,
                list(case.tensors(arguments).values()),
                [w.to(o.dtype) for w, o in zip(weights, outputs, strict=True)],
            ),
        ]

    for ours, pytorch, exact in zip(
        run(torch.float32, backend), run(torch.float32, "reference"), run(torch.float64, "reference"), strict=True
    ):
        assert relative_error(ours, exact) <= max(3 * relative_error(pytorch, exact), 4e-7)


@pytest.mark.sampled(2)
@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_forward_and_backward(case: Case, backend: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    # A few roundings of operands, each of half an ulp.
    assert max(pooled_errors(case, backend, dtype, generator)) < 2 * torch.finfo(dtype).eps


@each_backend
def test_non_contiguous_input(case: Case, backend: str, generator: torch.Generator) -> None:
    assert max(pooled_errors(case, backend, torch.float32, generator, strided)) < 2e-6


@each_backend
def test_no_images(case: Case, backend: str, generator: torch.Generator) -> None:
    arguments = case.make(generator)
    empty = leaves(case, first_images(arguments, 0), torch.float32)
    outputs, grads = gradients(case, empty, backend)
    assert all(o.shape[0] == 0 for o in outputs)
    for name, grad in zip(case.tensors(empty), grads, strict=True):
        assert grad.shape == empty[name].shape
        assert not grad.any(), f"the gradient of {name} over no images is 0"


@each_backend
def test_same_bits_each_run(case: Case, backend: str, generator: torch.Generator) -> None:
    made = case.make(generator)
    first = gradients(case, leaves(case, made, torch.float32), backend)
    second = gradients(case, leaves(case, made, torch.float32), backend)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@each_backend
def test_an_image_alone_and_in_a_batch(case: Case, backend: str, generator: torch.Generator) -> None:
    arguments = converted(case.make(generator), torch.bfloat16)
    alone = first_images(arguments, 1)
    for both, one in zip(case.run(arguments, backend), case.run(alone, backend), strict=True):
        assert torch.equal(both[: len(one)], one)


@each_backend
def test_frozen_inputs_get_no_gradient(case: Case, backend: str, generator: torch.Generator) -> None:
    made = case.make(generator)
    everything = gradients(case, leaves(case, made, torch.float32), backend)[1]
    for index, name in enumerate(case.tensors(made)):
        arguments = made | {n: t.float().requires_grad_(n == name) for n, t in case.tensors(made).items()}
        loss = loss_of(case.run(arguments, backend))
        torch.testing.assert_close(torch.autograd.grad(loss, arguments[name])[0], everything[index])


@pytest.mark.sampled(4)  # of each op some backends
@each_backend
def test_compiles_whole_with_the_same_result(case: Case, backend: str, generator: torch.Generator) -> None:
    arguments = leaves(case, case.make(generator), torch.float32)
    eager = gradients(case, arguments, backend)

    def run(**named: Any) -> tuple[Tensor, ...]:
        return case.run(named, backend)

    torch._dynamo.reset()  # else the cases count as recompilations of one function
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outputs = compiled(**arguments)
    grads = torch.autograd.grad(loss_of(outputs), list(case.tensors(arguments).values()))
    for a, b in zip(eager[0] + eager[1], [*outputs, *grads], strict=True):
        torch.testing.assert_close(a, b)


@each_case
def test_double_backward_is_a_clear_error(case: Case, generator: torch.Generator) -> None:
    arguments = leaves(case, case.make(generator), torch.float64)
    tensors = list(case.tensors(arguments).values())
    loss = sum(o.square().sum() for o in case.run(arguments, "reference"))
    grads = torch.autograd.grad(loss, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum(g.sum() for g in grads), tensors, allow_unused=True)


@each_backend
def test_forward_mode_and_torch_func(case: Case, backend: str, generator: torch.Generator) -> None:
    """jvp, vjp, jacobians and vmap give the formula's derivatives, on any backend."""
    arguments = case.make(generator)
    tensors = case.tensors(arguments)
    tangents = {n: torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in tensors.items()}

    def ours(named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        dtype = torch.float64 if backend in ("reference", "sdpa") else torch.float32
        return case.run(arguments | {n: t.to(dtype) for n, t in named.items()}, backend)

    def plain(named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return case.spec.plain(arguments | named)

    expected = torch.func.jvp(plain, (tensors,), (tangents,))[1]
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(torch.func.jvp(ours, (tensors,), (tangents,))[1], expected, **close)
    with torch.autograd.forward_ad.dual_level():
        duals = {n: torch.autograd.forward_ad.make_dual(t, tangents[n]) for n, t in tensors.items()}
        outputs = tuple(torch.autograd.forward_ad.unpack_dual(o).tangent for o in ours(duals))
    torch.testing.assert_close(outputs, expected, **close)

    def loss(function: Callable) -> Callable:
        return lambda named: sum(o.double().square().sum() for o in function(named))

    torch.testing.assert_close(torch.func.grad(loss(ours))(tensors), torch.func.grad(loss(plain))(tensors), **close)
    stacked = {n: torch.stack([t, 2 * t]) for n, t in tensors.items()}
    each = [ours({n: t[i] for n, t in stacked.items()}) for i in range(2)]
    together = torch.func.vmap(ours)(stacked)
    torch.testing.assert_close(together, tuple(map(torch.stack, zip(*each, strict=True))), **close)


def recorded_calls(case: Case, backend: str, generator: torch.Generator) -> list[tuple]:
    """The registered ops, forward and backward, that a call of `case` goes through, with their arguments."""
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "internvit":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    arguments = leaves(case, case.make(generator), torch.float32)
    with Record():
        gradients(case, arguments, backend)
    return calls


@pytest.mark.sampled(4)  # of each op some backends
@each_backend
def test_opcheck(case: Case, backend: str, generator: torch.Generator) -> None:
    calls = recorded_calls(case, backend, generator)
    names = {func._schema.name.removeprefix("internvit::") for func, _ in calls}
    assert any(n.endswith("_backward") for n in names)
    for func, args in calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, detached)
        if backend == "reference" and not func._schema.name.endswith("_backward"):
            # float64, so that opcheck's comparison of gradients is not one of roundings
            wide = tuple(
                a.detach().double().requires_grad_(a.requires_grad)
                if isinstance(a, Tensor) and a.is_floating_point()
                else a
                for a in args
            )
            reference = (*wide[:-1], "reference")
            torch.library.opcheck(func, reference)


@each_case
def test_ops_take_keyword_arguments_of_their_schema(case: Case, generator: torch.Generator) -> None:
    for func, args in recorded_calls(case, "reference", generator):
        named = {a.name: v for a, v in zip(func._schema.arguments, args, strict=True)}
        by_name, by_position = func(**named), func(*args)
        if isinstance(by_name, Tensor):
            by_name, by_position = (by_name,), (by_position,)
        assert all(map(torch.equal, by_name, by_position))


def test_every_defined_op_has_a_case() -> None:
    defined = {name.split("::")[1].split(".")[0] for name in LIBRARY._op_defs}
    inference = {spec.op for spec in INFERENCE_SPECS.values()}
    assert {n.removesuffix("_backward") for n in defined} == {c.spec.op for c in CASES} | inference


def test_backend_may_change_between_forward_and_backward() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    with internvit.backend("reference"):
        y = internvit.ops.rms_norm(x, weight)
    expected = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    with internvit.backend("auto"):
        again = torch.autograd.grad(y.sum(), (x, weight))
    assert all(map(torch.equal, expected, again))
