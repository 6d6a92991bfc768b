"""Calls what runs an op on a backend with the arguments of the op's schema."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internvit.ops.attention import QKNorm, SavedAttention
from internvit.ops.backends.registry import implementation
from internvit.ops.core.registration import OPS, Op, fill_gradients
from internvit.ops.core.sequences import pack
from internvit.ops.core.spec import Arguments, OpSpec, as_tuple, differentiable


class OpCall(NamedTuple):
    """A call of a registered op; `args` without `backend`."""

    op: Op
    args: tuple[Any, ...]
    outputs: tuple[Tensor, ...]

    @property
    def raw_args(self) -> tuple[Any, ...]:
        """The arguments of the op's implementation: with the gradients that it fills, if it is given them."""
        raw = torch._C.parse_schema(self.op.raw_schema)
        named = dict(zip((a.name for a in self.op.overload._schema.arguments), self.args, strict=False))
        gradients = dict(zip((r.name for r in self.op.overload._schema.returns), self.outputs, strict=True))
        return tuple((gradients if a.alias_info is not None else named)[a.name] for a in raw.arguments)

    @property
    def moved(self) -> tuple[Any, ...]:
        """What the implementation must read or write, a gradient that it adds to twice."""
        return (*self.raw_args, *self.outputs)


class _OpCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OpCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "internvit":
            plain = tuple(a.detach() if isinstance(a, Tensor) else a for a in args[:-1])
            self.calls.append(OpCall(OPS[func._schema.name.removeprefix("internvit::")], plain, as_tuple(out)))
        return out


def op_calls(spec: OpSpec, arguments: Arguments, backend: str = "reference") -> list[OpCall]:
    """The calls of registered ops, forward and backward, behind one call of the public function."""
    if not spec.trains:
        with _OpCalls() as seen:
            spec.run(arguments, backend)
        return seen.calls
    leaves = {n: t.detach().requires_grad_() for n, t in differentiable(arguments).items()}
    with _OpCalls() as seen:
        outputs = [t for t in spec.run({**arguments, **leaves}, backend) if t.requires_grad]
        torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(t) for t in outputs], allow_unused=True)
    return seen.calls


def call(op: str, backend: str, *args: Any) -> Any:
    """Runs `op` on arguments as in its schema; attention's backward takes grad_q, grad_k, grad_v last."""
    function = implementation(op, backend)
    if op == "attention":
        sequences = pack(*args[8:10], args[0].shape[0], *args[10:], args[1].shape[0]) if len(args) == 12 else None
        given = () if sequences is None else (sequences,)
        return function(*args[:4], None if args[4] is None else QKNorm(*args[4:8]), *given)
    if op == "attention_column_sums":
        return OPS[op].run(*args, *(None,) * (10 - len(args)), backend)
    if op == "attention_backward":
        grad_out, *saved = args[:7]
        qk_norm = None if args[7] is None else QKNorm(*args[7:11])
        grads = function(grad_out, SavedAttention(*saved, qk_norm), args[11:14])
        return fill_gradients((None,) * 4, grad_out) if grads is None else tuple(grads)
    outputs = function(*args)
    if isinstance(outputs, tuple) and any(o is None for o in outputs):
        return fill_gradients(outputs, next(a for a in args if isinstance(a, torch.Tensor)))
    return outputs
