"""What every op owes on every backend here, whatever it computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import internvit
from internvit.numerics import relative_error
from internvit.ops.core.registration import LIBRARY
from tests.ops.cases import CASES, CASES_AND_BACKENDS, Case

each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_backend = pytest.mark.parametrize(
    ("case", "backend"), CASES_AND_BACKENDS, ids=[f"{c}-{b}" for c, b in CASES_AND_BACKENDS]
)


def plain(t: Tensor) -> Tensor:
    return t


def strided(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t.repeat_interleave(2)[::2]


def leaves(
    arguments: dict[str, Tensor], dtype: torch.dtype, lay: Callable[[Tensor], Tensor] = plain
) -> dict[str, Tensor]:
    return {n: lay(t.to(dtype, copy=True)).requires_grad_() for n, t in arguments.items()}


def gradients(case: Case, arguments: dict[str, Tensor], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    outputs = case.run(arguments, backend)
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    return list(outputs), list(torch.autograd.grad(loss, list(arguments.values())))


@each_case
def test_gradcheck_of_the_reference(case: Case, generator: torch.Generator) -> None:
    arguments = leaves(case.make(generator), torch.float64)
    names = list(arguments)
    assert torch.autograd.gradcheck(
        lambda *tensors: case.run(dict(zip(names, tensors, strict=True)), "reference"), tuple(arguments.values())
    )


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
        made = {n: t.to(dtype).double() for n, t in case.make(generator).items()}
        truth = gradients(case, leaves(made, torch.float64), "reference")
        actual = gradients(case, leaves(made, dtype, lay), backend)
        draws.append((actual[0] + actual[1], truth[0] + truth[1]))
    errors = []
    for every in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        assert all(a.shape == t.shape for a, t in every)
        errors.append(relative_error(*(torch.stack(tensors) for tensors in zip(*every, strict=True))))
    return errors


@each_backend
def test_float32_forward_and_backward_follow_float64(case: Case, backend: str, generator: torch.Generator) -> None:
    assert max(pooled_errors(case, backend, torch.float32, generator)) < 2e-6


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
    arguments = {n: t.float() for n, t in case.make(generator).items()}
    empty = {n: (t[:0] if n in case.batched else t).clone().requires_grad_() for n, t in arguments.items()}
    outputs, grads = gradients(case, empty, backend)
    assert all(o.shape[0] == 0 for o in outputs)
    for name, grad in zip(empty, grads, strict=True):
        assert grad.shape == empty[name].shape
        assert not grad.any(), f"the gradient of {name} over no images is 0"


@each_backend
def test_same_bits_each_run(case: Case, backend: str, generator: torch.Generator) -> None:
    made = case.make(generator)
    first = gradients(case, leaves(made, torch.float32), backend)
    second = gradients(case, leaves(made, torch.float32), backend)
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert torch.equal(a, b)


@each_backend
def test_an_image_alone_and_in_a_batch(case: Case, backend: str, generator: torch.Generator) -> None:
    arguments = {n: t.bfloat16() for n, t in case.make(generator).items()}
    alone = {n: t[:1] if n in case.batched else t for n, t in arguments.items()}
    for both, one in zip(case.run(arguments, backend), case.run(alone, backend), strict=True):
        assert torch.equal(both[:1], one)


@each_backend
def test_frozen_inputs_get_no_gradient(case: Case, backend: str, generator: torch.Generator) -> None:
    made = case.make(generator)
    everything = gradients(case, leaves(made, torch.float32), backend)[1]
    for index, name in enumerate(made):
        arguments = {n: t.float().requires_grad_(n == name) for n, t in made.items()}
        outputs = case.run(arguments, backend)
        loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
        torch.testing.assert_close(torch.autograd.grad(loss, arguments[name])[0], everything[index])


@each_backend
def test_compiles_whole_with_the_same_result(case: Case, backend: str, generator: torch.Generator) -> None:
    arguments = leaves(case.make(generator), torch.float32)
    eager = gradients(case, arguments, backend)

    def run(**tensors: Tensor) -> tuple[Tensor, ...]:
        return case.run(tensors, backend)

    torch._dynamo.reset()  # else the cases count as recompilations of one function
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    outputs = compiled(**arguments)
    loss = sum((o.double() * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, list(arguments.values()))
    for a, b in zip(eager[0] + eager[1], [*outputs, *grads], strict=True):
        torch.testing.assert_close(a, b)


@each_case
def test_double_backward_is_a_clear_error(case: Case, generator: torch.Generator) -> None:
    arguments = leaves(case.make(generator), torch.float64)
    outputs = case.run(arguments, "reference")
    loss = sum(o.square().sum() for o in outputs)
    grads = torch.autograd.grad(loss, list(arguments.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum(g.sum() for g in grads), list(arguments.values()), allow_unused=True)


def recorded_calls(case: Case, backend: str, generator: torch.Generator) -> list[tuple]:
    """The registered ops, forward and backward, that a call of `case` goes through, with their arguments."""
    calls = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "internvit":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    arguments = leaves(case.make(generator), torch.float32)
    with Record():
        gradients(case, arguments, backend)
    return calls


@each_backend
def test_opcheck(case: Case, backend: str, generator: torch.Generator) -> None:
    calls = recorded_calls(case, backend, generator)
    names = {func._schema.name.removeprefix("internvit::") for func, _ in calls}
    assert any(n.endswith("_backward") for n in names)
    for func, args in calls:
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
        torch.library.opcheck(func, detached)
        if not func._schema.name.endswith("_backward"):
            # float64, so that opcheck's comparison of gradients is not one of roundings
            wide = tuple(
                a.detach().double().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
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
    covered = {c.name.split("-")[0] for c in CASES}
    assert {n.removesuffix("_backward") for n in defined} == covered


def test_backend_may_change_between_forward_and_backward() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    weight = torch.randn(8, requires_grad=True)
    with internvit.backend("reference"):
        y = internvit.ops.rms_norm(x, weight)
    expected = torch.autograd.grad(y.sum(), (x, weight), retain_graph=True)
    with internvit.backend("auto"):
        again = torch.autograd.grad(y.sum(), (x, weight))
    assert all(map(torch.equal, expected, again))
