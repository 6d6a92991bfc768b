"""Defines the ops of namespace `internvit`, once, in Python: schema, fake, gradient, choice of implementation.

Every registered schema ends in `str backend`, a name already resolved (see `select.resolve`): it is kept for backward,
so that backward runs where forward ran, and it is part of compiled and exported graphs.

An op goes through the dispatcher wherever something sees it there: torch.compile and export, dispatch and function
modes (fake tensors, selective checkpointing, FLOP counters), torch.jit.trace, profilers, tensor subclasses. Elsewhere
an eager call runs the implementation directly. Under torch.func and forward-mode differentiation, ops run as the
reference implementation, which is plain PyTorch and so has every derivative.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from internvit.ops.backends.registry import implementation
from internvit.ops.core.autocast import autocast_dtype, cast
from internvit.ops.core.derivative import Plan, below_autograd, derive_function, empty_grad, underivable
from internvit.ops.core.direct import (
    PLAIN,
    exports_onnx,
    has_tangent,
    leaves_library,
    nothing_watches,
    plain,
    transformed,
)
from internvit.ops.core.fallback import (
    AutoBackend,
    CallClass,
    KernelStartError,
    any_failure,
    first_backend,
    guarded,
    pass_over,
)
from internvit.ops.core.flops import FORMULAS, register_when_counted
from internvit.ops.core.namespace import NAMESPACE
from internvit.ops.core.select import check_named, forget_resolved, requested, resolve

Mask: TypeAlias = "tuple[bool, ...] | list[bool]"

LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPS: dict[str, "Op"] = {}
"""Every registered op, backward ops too."""

_MOST_CHOICES = 4096
_NONE = type(None)

_chosen: ContextVar[AutoBackend | None] = ContextVar("internvit_chosen", default=None)
"""What `auto` chose for the op that is called now through the dispatcher, which hands plain names on."""


def fill_gradients(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients with placeholders for those that are None."""
    return tuple([empty_grad(like) if g is None else g for g in grads])


class Op:
    """A registered op: `op(*args)` runs it, with `backend` as the last argument.

    Attributes:
        name: in namespace `internvit`.
        schema: `name(arguments) -> outputs` without `str backend`.
        compiled: the backends ("cpu", "cuda") whose library has an op of this name.
        raw_schema: that op's schema.
        run: the function behind the dispatcher; takes all arguments. Raises KernelStartError where a kernel cannot be
            compiled or started.
        check: takes all arguments and raises a ValueError that names a wrong one. What the dispatcher calls, fake or
            not, checks first; the direct calls of public functions, and of autograd, come with checked arguments.
        overload: the op as torch knows it.
        fakes: backend -> the fake implementation of its library's op.
        formula: the first outputs from the named arguments without `backend`, in plain PyTorch; None for backward ops.
    """

    def __init__(
        self,
        schema: str,
        run: Callable | None,
        check: Callable[..., None],
        compiled: Sequence[str] = (),
        raw_schema: str | None = None,
    ) -> None:
        self.schema = schema
        self.compiled = tuple(compiled)
        self.raw_schema = raw_schema or schema
        self.name = schema[: schema.index("(")]
        arguments, _, returns = schema.rpartition(") -> ")
        LIBRARY.define(f"{arguments}, str backend) -> {returns}")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.run = guarded(self.name, run or self._run_in_backend)
        self.check = check
        self.fakes: dict[str, Callable] = {}
        self.formula: Callable[..., Any] | None = None
        self.function: Any = underivable(self, self.overload)
        LIBRARY.impl(self.name, self._check_and_run, "CompositeExplicitAutograd")
        LIBRARY.impl(self.name, self._dispatch_autograd, "Autograd")
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        through_dispatcher = not (nothing_watches() and plain(args)) or torch.is_grad_enabled()
        return self.run_or_fall_back(self.overload if through_dispatcher else self.run, args)

    def run_dispatched(self, *args: Any) -> Any:
        return self.run_or_fall_back(self.overload, args)

    def run_or_fall_back(self, call: Callable, args: tuple[Any, ...]) -> Any:
        """`call(*args)`; where `auto` chose args[-1] and its kernel does not start, the next backend's."""
        if any_failure() and isinstance(args[-1], AutoBackend):
            args = (*args[:-1], first_backend(self._calls(args), self.name, at=args[-1]))
        try:
            return call(*args)
        except KernelStartError as error:
            return self._fall_back(call, args, error)

    def _fall_back(self, call: Callable, args: tuple[Any, ...], error: KernelStartError) -> Any:
        name = args[-1]
        if not isinstance(name, AutoBackend):
            raise error
        calls = self._calls(args)
        while True:
            pass_over(name, self.name, calls, error)
            self.forget_choices()
            forget_resolved()
            name = first_backend(calls, self.name, at=name)
            try:
                return call(*args[:-1], name)
            except KernelStartError as another:
                error = another

    def decompose(self, *args: Any) -> Any:
        """All outputs in plain PyTorch, for graphs that other programs run; takes all arguments.

        What is only kept for backward comes from the reference: dead code in a graph without one.
        """
        outputs = self.run(*args[:-1], "reference")
        first = self.portable_outputs(*args)
        if first is None or isinstance(outputs, Tensor):
            return outputs if first is None else first[0]
        return (*first, *outputs[len(first) :])

    def portable_outputs(self, *args: Any) -> tuple[Tensor, ...] | None:
        """The outputs of the public function by the formula; None where only the reference computes them.

        Tensors of several dtypes, such as float32 weights beside 16-bit activations, are left to the reference:
        PyTorch's own functions do not take them, or round more than once.
        """
        dtypes = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
        if self.formula is None or len(dtypes) > 1:
            return None
        names = [a.name for a in self.overload._schema.arguments[:-1]]
        named = dict(zip(names, args, strict=False))
        named.pop("rounding", None)  # other programs round in their own order
        outputs = self.formula(**named)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    def _calls(self, args: tuple[Any, ...]) -> CallClass:
        """The calls that `auto` chose args[-1] for.

        A backward is given lse. Where QK-norm was inside the attention, that is of q_hat and k_hat unrounded, and only
        a backend that has QK-norm inside as well can take it.
        """
        calls: CallClass = args[-1].calls
        named = dict(zip((a.name for a in self.overload._schema.arguments), args, strict=True))
        return dataclasses.replace(calls, folded=True) if "lse" in named and named["q_weight"] is not None else calls

    def forget_choices(self) -> None:
        """Backends are chosen anew: after a kernel did not start, and in tests that replace backends."""

    def _check_and_run(self, *args: Any) -> Any:
        self.check(*args)
        return self.run(*args)

    def register_fake(self, fake: Callable, raw_fake: Callable | None = None) -> None:
        """`fake` takes all arguments; `raw_fake` those of `raw_schema`, and checks them itself."""

        def checked(*args: Any) -> Any:
            self.check(*args)
            return fake(*args)

        torch.library.register_fake(f"{NAMESPACE}::{self.name}", checked, lib=LIBRARY)
        for backend in self.compiled:
            self.fakes[backend] = raw_fake or (lambda *args, name=backend: checked(*args, name))

    def _run_in_backend(self, *args: Any) -> Any:
        outputs = implementation(self.name, args[-1])(*args[:-1])
        if type(outputs) is tuple and _NONE in map(type, outputs):
            return fill_gradients(outputs, next(a for a in args if isinstance(a, Tensor)))
        return outputs

    def _dispatch_autograd(self, *args: Any) -> Any:
        register_when_counted()
        if torch.jit.is_tracing():  # the graph holds the op, which is differentiated when the graph runs
            return below_autograd(self.overload, *args)
        if transformed(args):
            self.check(*args)
            return self.run(*args[:-1], "reference")
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            self.check(*args)
            chosen = _chosen.get()
            return self.function.apply(*args[:-1], chosen if chosen == args[-1] else args[-1])
        return below_autograd(self.overload, *args)


class PublicOp(Op):
    """An op with a public function: arguments are cast, validated and given a backend here.

    Args:
        validate: called with the arguments without `backend`; raises ValueError.
        autocast: the arguments that autocast casts, as for torch's own products.
        choose: (arguments, backend asked for) -> the name of a backend; by default `resolve` of the first argument.
    """

    def __init__(
        self,
        schema: str,
        run: Callable | None,
        validate: Callable[..., None],
        choose: Callable[[tuple[Any, ...], str | None], str] | None,
        autocast: Sequence[str] = (),
        compiled: Sequence[str] = (),
        raw_schema: str | None = None,
    ) -> None:
        super().__init__(schema, run, self._check_registered, compiled, raw_schema)
        names = [a.name for a in self.overload._schema.arguments[:-1]]
        self._tensor_names = [
            (i, a.name, "Optional" in str(a.type))
            for i, a in enumerate(self.overload._schema.arguments[:-1])
            if "Tensor" in str(a.type)
        ]
        self._validate = validate
        self._cast_positions = frozenset(names.index(name) for name in autocast)
        self._choose = choose or (lambda args, asked: resolve(self.name, args[0], asked))
        self._choices: dict[tuple[Any, ...], str] = {}

    def call(self, args: tuple[Any, ...], backend: str | None) -> Any:
        """The op on `args` as in its schema, on the backend asked for or chosen.

        Arguments are validated once for each combination of their shapes, dtypes, devices and values.
        """
        if self._cast_positions:
            args = self._autocast(args)
        if not nothing_watches():
            return self._call_watched(args, backend)
        key: list[Any] = [backend, requested()]
        differentiate = False
        for a in args:
            if type(a) in PLAIN:
                needs = a.requires_grad
                key += (a.shape, a.dtype, a.device, needs)
                if needs:
                    differentiate = True
            elif isinstance(a, Tensor):
                return self._call_watched(args, backend)
            else:
                key.append(a)
        try:
            name = self._choices.get(tuple(key))
        except TypeError:  # an argument that cannot be hashed is none of ours
            return self._call_watched(args, backend)
        if name is None:
            if not plain(args):  # on the meta device
                return self._call_watched(args, backend)
            name = self._check_and_choose(args, backend)
            if len(self._choices) >= _MOST_CHOICES:
                self._choices.clear()
            self._choices[tuple(key)] = name
        if has_tangent(args):  # nothing watches: torch.func is not at work
            return self.run(*args, "reference")
        run = self.function.apply if differentiate and torch.is_grad_enabled() else self.run
        try:
            return run(*args, name)
        except KernelStartError as error:
            return self._fall_back(run, (*args, name), error)

    def _call_watched(self, args: tuple[Any, ...], backend: str | None) -> Any:
        name = self._check_and_choose(args, backend)
        if transformed(args):
            return self.run(*args, "reference")
        if leaves_library(isinstance(name, AutoBackend)):
            return self._call_portable(*args, name)
        if torch.compiler.is_compiling():
            return self.overload(*args, name)
        return self.run_or_fall_back(self._call_overload, (*args, name))

    def _call_portable(self, *args: Any) -> Any:
        """As `decompose`, with None for what is only kept for backward."""
        # TorchScript's exporter to ONNX has no RMSNorm; the reference is made of arithmetic.
        first = None if exports_onnx() and torch.jit.is_tracing() else self.portable_outputs(*args)
        if first is None:
            return self.run(*args[:-1], "reference")
        count = len(self.overload._schema.returns)
        return first[0] if count == 1 else (*first, *[None] * (count - len(first)))

    def _call_overload(self, *args: Any) -> Any:
        token = _chosen.set(args[-1] if isinstance(args[-1], AutoBackend) else None)
        try:
            return self.overload(*args)
        finally:
            _chosen.reset(token)

    def _check_and_choose(self, args: tuple[Any, ...], backend: str | None) -> str:
        for i, name, optional in self._tensor_names:
            if not isinstance(args[i], Tensor) and not (optional and args[i] is None):
                raise TypeError(f"{self.name}: {name} must be a torch.Tensor, got {type(args[i]).__name__}")
        self._validate(*args)
        return self._choose(args, backend)

    def _check_registered(self, *args: Any) -> None:
        self._validate(*args[:-1])
        check_named(args[-1])
        self._choose(args[:-1], args[-1])

    def _autocast(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(args[0], Tensor):
            return args
        dtype = autocast_dtype(args[0].device.type)
        if dtype is None:
            return args
        return tuple(cast(a, dtype) if i in self._cast_positions else a for i, a in enumerate(args))

    def forget_choices(self) -> None:
        self._choices.clear()


GradLike: TypeAlias = "str | Callable[[dict[str, Any]], Tensor]"


def define(
    schema: str,
    *,
    fake: Callable,
    validate: Callable[..., None],
    run: Callable | None = None,
    autocast: Sequence[str] = (),
    choose: Callable[[tuple[Any, ...], str | None], str] | None = None,
    flops: Callable[..., int] | None = None,
    compiled: Sequence[str] = (),
    raw_schema: str | None = None,
    raw_fake: Callable | None = None,
) -> PublicOp:
    """Defines an op.

    Args:
        schema: `name(arguments) -> outputs`; the registered op has `str backend` as its last argument.
        fake: the outputs' shapes, strides and dtypes from fake inputs; takes all arguments, `backend` too.
        validate, run, autocast, choose: see `PublicOp` and `Op`.
        flops: FLOPs from the arguments, tensors given as their shapes, as in torch.utils.flop_counter.
        compiled: the backends ("cpu", "cuda") whose library has this op and its backward.
        raw_schema, raw_fake: as for `define_backward`.
    """
    op = PublicOp(schema, run, validate, choose, autocast, compiled, raw_schema)
    if flops is not None:
        FORMULAS[op.name] = flops
    op.register_fake(fake, raw_fake)
    return op


def define_backward(
    forward: PublicOp,
    schema: str,
    *,
    validate: Callable[..., None],
    grads_like: Mapping[str, GradLike] | None = None,
    run: Callable | None = None,
    saved_for: Mapping[str, tuple[str, ...]] | None = None,
    passes_through: str | None = None,
    when_differentiated: Mapping[str, Any] | None = None,
    flops: Callable[..., int] | None = None,
    raw_schema: str | None = None,
    raw_fake: Callable | None = None,
) -> Op:
    """Defines the backward of `forward`, and with it the autograd Function of `forward` (see `derivative`).

    Args:
        schema: `name_backward(arguments) -> (Tensor grad_x, ...)`.
        validate: called with all arguments, `backend` too; raises ValueError.
        grads_like: output -> the argument whose shape and dtype it has, or a function of the named arguments; by
            default `grad_x` is like the argument `x`.
        saved_for: input -> the inputs of which one must need a gradient for it to be saved.
        passes_through: the input whose gradient is that of the first output, unchanged.
        when_differentiated: inputs of `forward` that have this value where a gradient is needed.
        flops: as for `define`.
        raw_schema: that of the compiled libraries' op, where it is not `schema`: it may fill gradients that the caller
            made, so that several may be views of one packed buffer.
        raw_fake: of that op; checks its arguments.
    """

    def check(*args: Any) -> None:
        dtypes = [a for a in args if isinstance(a, torch.dtype)]
        check_named(args[-1], next(a for a in args if isinstance(a, Tensor)), *dtypes)
        validate(*args)

    op = Op(schema, run, check, forward.compiled, raw_schema)
    if flops is not None:
        FORMULAS[op.name] = flops
    names = [a.name for a in op.overload._schema.arguments]
    returns = [r.name for r in op.overload._schema.returns]
    likes = {name: name.removeprefix("grad_") for name in returns} | dict(grads_like or {})

    def fake(*args: Any) -> Any:
        named = dict(zip(names, args, strict=True))
        mask = named.get("output_mask", [True] * len(returns))
        grads = []
        first = next(a for a in args if isinstance(a, Tensor))
        for name, needed in zip(returns, mask, strict=True):
            like = likes[name]
            x = named.get(like) if isinstance(like, str) else like(named) if needed else None
            grads.append(x.new_empty(x.shape) if needed and x is not None else empty_grad(first))
        return grads[0] if len(grads) == 1 else tuple(grads)

    op.register_fake(fake, raw_fake)
    schemas = forward.overload._schema, op.overload._schema
    plan = Plan(*schemas, saved_for or {}, passes_through, when_differentiated or {})
    forward.function = derive_function(forward, forward.overload, op, plan)
    return op
