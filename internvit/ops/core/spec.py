"""One `OpSpec` an op: all that tests, the self-check, benchmarks, profiles and documentation need to know of it.

A spec states the public function, its plain PyTorch formula, example inputs at any size, and the rule of the numerics
contract that a result keeps. What follows from these is not written down anywhere else: test cases, self-checks,
benchmark inputs, bytes and FLOPs (`cost`), the tables in the documentation.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from internvit.numerics import layer_norm_terms, norm_violations, product_violations, sample
from internvit.ops.core.flops import FORMULAS
from internvit.ops.core.namespace import NAMESPACE
from internvit.ops.core.registration import OPS


@dataclass(frozen=True)
class Size:
    """Images, tokens, heads and head dimension; hidden_size = heads * head_dim."""

    batch: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def hidden_size(self) -> int:
        return self.heads * self.head_dim

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}x{self.hidden_size}"


TINY = Size(2, 5, 2, 8)
SIZES = {"tiny": TINY, "300M": Size(1, 1025, 16, 64), "6B": Size(1, 1025, 25, 128)}


@dataclass
class Inputs:
    """Makes an op's example inputs: fresh random tensors of one size, dtype and device.

    Attributes:
        distribution: of activations, one of `internvit.numerics.DISTRIBUTIONS`.
        row_scale: whether DropPath's factors are given.
    """

    size: Size
    generator: torch.Generator | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    distribution: str = "normal"
    row_scale: bool = True

    def _random(self, shape: tuple[int, ...], distribution: str) -> Tensor:
        if torch.device(self.device).type == "meta":
            return torch.empty(shape, dtype=self.dtype, device="meta")
        generator = self.generator or torch.Generator().manual_seed(0)
        return sample(shape, distribution, self.dtype, generator, str(self.device))

    def hidden_states(self, width: int | None = None) -> Tensor:
        """[B, N, C] or [B, N, width]."""
        return self._random((self.size.batch, self.size.tokens, width or self.size.hidden_size), self.distribution)

    def branch(self) -> Tensor:
        """[B, N, C], normal: what is added to a residual stream."""
        return self._random((self.size.batch, self.size.tokens, self.size.hidden_size), "normal")

    def qkv(self) -> Tensor:
        """[B, N, 3, H, D], as the projection writes it."""
        packed = self.hidden_states(3 * self.size.hidden_size)
        return packed.unflatten(-1, (3, self.size.heads, self.size.head_dim))

    def packed_qkv(self) -> Tensor:
        """[total, 3, H, D], the images of `sequences` one after the other."""
        return self.qkv().flatten(0, 1)

    def sequences(self) -> dict[str, Any]:
        """cu_seqlens and max_seqlen: B images and an empty one that share B * N tokens unevenly."""
        images, tokens = self.size.batch, self.size.tokens
        lengths = [tokens] * images
        for i in range(0, images - 1, 2):
            given = tokens // 3
            lengths[i], lengths[i + 1] = tokens - given, tokens + given
        lengths.insert(min(1, images), 0)
        return {"cu_seqlens": self._ends(lengths), "max_seqlen": max(lengths)}

    def _ends(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.device)

    def keys_and_values(self) -> dict[str, Any]:
        """k, v [B, N_k, H, D], N_k about half of N."""
        tokens = self.size.tokens // 2 + 2
        qkv = replace(self, size=replace(self.size, tokens=tokens)).qkv()
        return {"k": qkv[:, :, 1], "v": qkv[:, :, 2]}

    def packed_keys_and_values(self) -> dict[str, Any]:
        """The sequences of queries beside k, v [total_k, H, D] and theirs: the first has no key."""
        heads, batch = {n: t.flatten(0, 1) for n, t in self.keys_and_values().items()}, self.size.batch
        total, queries = heads["k"].shape[0], self.sequences()
        lengths = [0] + [total // batch] * (batch - 1) + [total - (batch - 1) * (total // batch)] if batch else [0]
        return heads | queries | {"cu_seqlens_k": self._ends(lengths), "max_seqlen_k": max(lengths)}

    def padded_keys_and_values(self) -> dict[str, Any]:
        heads = self.keys_and_values()
        return heads | self.padding(heads["k"].shape[1])

    def padding(self, tokens: int | None = None) -> dict[str, Any]:
        """A key_padding_mask [B, N] or [B, tokens]: every third token of an image, other ones in the next."""
        tokens = self.size.tokens if tokens is None else tokens
        places = torch.arange(tokens) + 2 * torch.arange(self.size.batch)[:, None]
        return {"key_padding_mask": (places % 3 == 1).to(self.device)}

    def vector(self, around: float = 0.0, length: int | None = None) -> Tensor:
        """A parameter [C] or [length] as trained ones are: not all alike."""
        t = self._random((length or self.size.hidden_size,), "normal")
        return around + 0.3 * t

    def matrix(self, rows: int, columns: int) -> Tensor:
        """A Linear's weight [rows, columns], scaled so that its output is of the input's size."""
        return self._random((rows, columns), "normal") * columns**-0.5

    def drop_path(self) -> Tensor | None:
        """DropPath's factor of each image [B] float32: every third image dropped."""
        if not self.row_scale:
            return None
        factors = torch.tensor([1.25, 0.0, 1.25]).repeat(self.size.batch)[: self.size.batch]
        return factors.to(self.device)


Arguments = dict[str, Any]
Violations = Callable[[Arguments, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]], list[str]]


def rounds_once(inputs: Arguments, actual: Any, truth: Any, eager: Any) -> list[str]:
    """Every output is the correctly rounded truth to one ulp."""
    return [v for a, t, e in zip(actual, truth, eager, strict=True) for v in norm_violations(a, t, e)]


def multiplies(inputs: Arguments, actual: Any, truth: Any, eager: Any) -> list[str]:
    """Every output errs at most 1.02 times as much as the eager formula in 16 bit, twice in float32."""
    factor = 2.0 if actual[0].dtype == torch.float32 else 1.02
    return [v for a, t, e in zip(actual, truth, eager, strict=True) for v in product_violations(a, t, e, factor)]


def layer_norm_rule(inputs: Arguments, actual: Any, truth: Any, eager: Any) -> list[str]:
    """As `rounds_once`, with the roundings of the terms that cancel in a LayerNorm allowed for."""
    x = inputs["x"].double()
    condition = (x.mean(-1).abs() / x.std(-1)).max().item() if x.numel() and x.shape[-1] > 1 else 1.0
    bias = torch.zeros_like(inputs["weight"]) if inputs["bias"] is None else inputs["bias"]
    terms = layer_norm_terms(inputs["x"], inputs["weight"], bias)
    return norm_violations(actual[0], truth[0], eager[0], terms, condition)


@dataclass(frozen=True)
class OpSpec:
    """One op, stated once.

    Attributes:
        function: the public function.
        op: the registered op that it calls.
        formula: the same in plain differentiable PyTorch, on the same arguments without `backend`; the truth in
            float64, the eager way in any other dtype, and what torch.compile is given.
        examples: variant -> a function of `Inputs` that returns the public function's arguments.
        violations: (arguments, outputs, float64 truth, eager outputs) -> what the outputs break of the contract.
        resolves_as: the op whose implementation decides on which backends this one runs.
        portable: what exported graphs hold, where it is not `formula`: the op's outputs from its arguments by name, in
            the PyTorch functions that other runtimes have kernels for.
    """

    function: Callable[..., Any]
    op: str
    formula: Callable[..., Any]
    examples: Mapping[str, Callable[[Inputs], Arguments]]
    violations: Violations = rounds_once
    resolves_as: str = ""
    portable: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def multiplies_matrices(self) -> bool:
        return self.op in FORMULAS

    @property
    def trains(self) -> bool:
        """Whether the op has a backward."""
        return self.name in SPECS

    @property
    def implemented_as(self) -> str:
        return self.resolves_as or self.op

    def demands(self, variant: str) -> dict[str, bool]:
        """What a backend must take to run a variant of attention's example; see `registry.backends_for`."""
        folded = self.name == "attention" and variant.startswith("qk_norm")
        return {"folded": folded, "varlen": variant.endswith(("cu_seqlens", "key_padding_mask"))}

    def run(self, arguments: Arguments, backend: str | None = None) -> tuple[Tensor, ...]:
        return as_tuple(self.function(**arguments, backend=backend))

    def plain(self, arguments: Arguments) -> tuple[Tensor, ...]:
        return as_tuple(self.formula(**arguments))

    def truth(self, arguments: Arguments) -> tuple[Tensor, ...]:
        """The formula's outputs in float64."""
        return self.plain(widened(arguments))


SPECS: dict[str, OpSpec] = {}
INFERENCE_SPECS: dict[str, OpSpec] = {}
"""Ops with integers or float8, which have no backward."""


def every_spec() -> dict[str, OpSpec]:
    return SPECS | INFERENCE_SPECS


def register_spec(spec: OpSpec) -> OpSpec:
    SPECS[spec.name] = spec
    OPS[spec.op].formula = spec.portable or spec.formula
    return spec


def register_inference_spec(spec: OpSpec) -> OpSpec:
    INFERENCE_SPECS[spec.name] = spec
    return spec


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


_INDICES = ("cu_seqlens", "cu_seqlens_k", "key_padding_mask")


def widened(arguments: Arguments) -> Arguments:
    """The arguments with tensors in float64, but for indices and masks."""
    return {n: a.detach().double() if isinstance(a, Tensor) and n not in _INDICES else a for n, a in arguments.items()}


def differentiable(arguments: Arguments) -> dict[str, Tensor]:
    """The arguments that have gradients: every tensor but DropPath's factors, indices and masks."""
    return {n: a for n, a in arguments.items() if isinstance(a, Tensor) and n not in ("row_scale", *_INDICES)}


def converted(arguments: Arguments, dtype: torch.dtype) -> Arguments:
    """The arguments with tensors in `dtype`; statistics, and DropPath's factors, stay at least float32."""
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = differentiable(arguments)
    return arguments | {n: t.to(accumulate if n.startswith("rstd_") else dtype) for n, t in tensors.items()}


def batched(arguments: Arguments) -> list[str]:
    """The arguments whose first dimension is the image."""
    names = {"x", "residual", "branch", "q", "k", "v", "qkv", "pre_activation", "row_scale", "rstd_q", "rstd_k"}
    names.add("key_padding_mask")
    return [n for n, a in arguments.items() if n in names and isinstance(a, Tensor)]


def first_images(arguments: Arguments, images: int) -> Arguments:
    """The arguments of the first images of a batch, or of packed sequences."""
    ends = {n: t for n, t in arguments.items() if n.startswith("cu_seqlens") and t is not None}
    tokens = {n: int(t[images]) for n, t in ends.items()}
    first = tokens.get("cu_seqlens", images)
    fewer = {n: arguments[n][:first] for n in batched(arguments)}
    fewer |= {n: arguments[n][: tokens.get("cu_seqlens_k", first)] for n in fewer.keys() & {"k", "v"}}
    return arguments | fewer | {n: t[: images + 1] for n, t in ends.items()}


@dataclass(frozen=True)
class Cost:
    """The least that a forward, and a forward and backward, must move (bytes) and multiply (FLOPs)."""

    forward_bytes: int
    forward_flops: int
    both_bytes: int
    both_flops: int


class _Count(TorchDispatchMode):
    """Sums the bytes of the tensors that the registered ops called inside read and write, and their FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == NAMESPACE:
            tensors = [t for t in (*args, *as_tuple(out)) if isinstance(t, Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
            formula = FORMULAS.get(func._schema.name.removeprefix(f"{NAMESPACE}::"))
            if formula is not None:
                shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
                self.flops += formula(*shapes)
        return out


def cost(spec: OpSpec, size: Size, dtype: torch.dtype, variant: str = "") -> Cost:
    """Each tensor that the op and its backward read or write once, and the products they cannot avoid."""
    example = spec.examples[variant or next(iter(spec.examples))]
    arguments = example(Inputs(size, dtype=dtype, device="meta"))
    with _Count() as forward, torch.no_grad():
        spec.run(arguments, "reference")
    if not spec.trains:
        return Cost(forward.bytes, forward.flops, forward.bytes, forward.flops)
    leaves = {n: t.detach().requires_grad_() for n, t in differentiable(arguments).items()}
    with _Count() as both:
        outputs = spec.run({**arguments, **leaves}, "reference")
        torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(o) for o in outputs])
    return Cost(forward.bytes, forward.flops, both.bytes, both.flops)
