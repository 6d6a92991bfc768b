"""The autograd Function of an op, derived from the schemas of the op and of its backward.

Autograd keeps what the backward op names: its argument `grad_y` is the gradient of output `y`, an argument with the
name of an input or output is saved, `output_mask` says which gradients are needed, `x_dtype` is the dtype of input `x`,
and its output `grad_x` is the gradient of input `x`. Outputs without a gradient argument are not differentiable.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import Function

from internvit.ops.core.direct import nothing_watches, plain
from internvit.ops.core.namespace import NAMESPACE


def below_autograd(op: Callable, *args: Any) -> Any:
    """Calls `op` past its own Autograd kernel: how an `autograd.Function` runs the forward it wraps."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def empty_grad(like: Tensor) -> Tensor:
    """A placeholder for a gradient that is not needed (schemas have no optional outputs): float32 [0]."""
    return like.new_empty(0, dtype=torch.float32)


class Plan:
    """How to call a backward op from what autograd hands over; see the module's docstring.

    Args:
        forward, backward: the two schemas; both end in `str backend`.
        saved_for: input -> the inputs of which one must need a gradient for it to be saved.
        passes_through: the input whose gradient is that of the first output, unchanged.
        when_differentiated: inputs that have this value where a gradient is needed.
    """

    def __init__(
        self,
        forward: Any,
        backward: Any,
        saved_for: Mapping[str, tuple[str, ...]],
        passes_through: str | None,
        when_differentiated: Mapping[str, Any],
    ) -> None:
        inputs = [a.name for a in forward.arguments]
        outputs = [r.name for r in forward.returns]
        self.inputs = len(inputs)
        self.passes_through = None if passes_through is None else inputs.index(passes_through)
        self.when_differentiated = {inputs.index(name): value for name, value in when_differentiated.items()}
        self.grads_of = [inputs.index(r.name.removeprefix("grad_")) for r in backward.returns]
        self.tensors: list[tuple[int, int, tuple[int, ...]]] = []  # argument, input, those it is saved for
        self.values: list[tuple[int, int]] = []  # argument, input that is no tensor
        self.from_outputs: list[tuple[int, int]] = []
        self.dtypes: list[tuple[int, int]] = []
        self.grads: list[tuple[int, int, bool]] = []  # argument, output, whether it must be given
        self.mask: int | None = None
        for i, argument in enumerate(backward.arguments):
            name = argument.name
            if name in inputs and "Tensor" in str(argument.type):
                needs = tuple(inputs.index(n) for n in saved_for.get(name, ()))
                self.tensors.append((i, inputs.index(name), needs))
            elif name in inputs:
                self.values.append((i, inputs.index(name)))
            elif name in outputs:
                self.from_outputs.append((i, outputs.index(name)))
            elif name == "output_mask":
                self.mask = i
            elif name.endswith("_dtype"):
                self.dtypes.append((i, inputs.index(name.removesuffix("_dtype"))))
            else:
                required = "Optional" not in str(argument.type)
                self.grads.append((i, outputs.index(name.removeprefix("grad_")), required))
        self.arguments = len(backward.arguments)
        self.saved = [entry[0] for entry in self.tensors] + [entry[0] for entry in self.from_outputs]
        self.differentiable = [output for _, output, _ in self.grads]
        self.constant = [i for i in range(len(outputs)) if i not in self.differentiable]
        # With one differentiable output alone, backward is not called without its gradient.
        self.zeros = [o for _, o, required in self.grads if required] if len(self.grads) > 1 else []

    def save(self, ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        """Keeps in `ctx` what backward's arguments are when forward ends."""
        tensors = [
            inputs[i] if not needs or any(ctx.needs_input_grad[j] for j in needs) else None
            for _, i, needs in self.tensors
        ]
        ctx.save_for_backward(*tensors, *[outputs[i] for _, i in self.from_outputs])
        values: list[Any] = [None] * self.arguments
        for argument, i in self.values:
            values[argument] = inputs[i]
        for argument, i in self.dtypes:
            values[argument] = inputs[i].dtype
        ctx.values = values
        ctx.likes = {i: (outputs[i].shape, outputs[i].dtype, outputs[i].device) for i in self.zeros}

    def restore(self, ctx: Any, grads: tuple[Tensor | None, ...], needs: list[bool]) -> list[Any]:
        """Backward's arguments."""
        args = list(ctx.values)
        # Read once: a checkpoint gives each saved tensor out only once.
        for i, tensor in zip(self.saved, ctx.saved_tensors, strict=True):
            args[i] = tensor
        for argument, output, required in self.grads:
            grad = grads[output]
            if grad is None and required:
                shape, dtype, device = ctx.likes[output]
                grad = torch.zeros(shape, dtype=dtype, device=device)
            args[argument] = grad
        if self.mask is not None:
            args[self.mask] = needs
        return args


def derive_function(op: Any, overload: Callable, backward: Any, plan: Plan) -> type[Function]:
    """The Function whose forward runs `op` and whose backward runs the op `backward`."""

    class Derived(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            if plan.when_differentiated:
                args = tuple(plan.when_differentiated.get(i, a) for i, a in enumerate(args))
            result = op.run(*args) if nothing_watches() and plain(args) else below_autograd(overload, *args)
            outputs = (result,) if isinstance(result, Tensor) else tuple(result)
            plan.save(ctx, args, outputs)
            if plan.constant:
                ctx.mark_non_differentiable(*[outputs[i] for i in plan.constant])
            ctx.set_materialize_grads(False)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            results: list[Tensor | None] = [None] * plan.inputs
            if all(grads[i] is None for i in plan.differentiable):
                return tuple(results)
            asked = ctx.needs_input_grad
            if plan.passes_through is not None and asked[plan.passes_through]:
                results[plan.passes_through] = grads[0]
            needs = [asked[i] for i in plan.grads_of]
            if True in needs:
                # Of gradients that is_grads_batched=True hands over, the dispatcher runs the op once for each.
                batched = any(g is not None and is_legacy_batchedtensor(g) for g in grads)
                run = backward.run_dispatched if batched else backward
                outputs = _as_tuple(run(*plan.restore(ctx, grads, needs)))
                for i, needed, grad in zip(plan.grads_of, needs, outputs, strict=True):
                    results[i] = grad if needed else None
            return tuple(results)

    Derived.__name__ = Derived.__qualname__ = f"{op.name}_function"
    return Derived


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def underivable(op: Any, overload: Callable) -> type[Function]:
    """The Function of an op without a backward: differentiating it is a clear error."""

    class Underivable(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below_autograd(overload, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{NAMESPACE}::{op.name} has no derivative: double backward is not implemented; "
                "use internvit.reference or plain PyTorch where second derivatives are needed"
            )

    return Underivable
