"""The correctness suite for people without the checkout: every op and backend and a whole model against float64.

Each check makes fresh random data, runs an op on one backend and asks `internvit.numerics` what it breaks.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from internvit import ops, reference
from internvit.config import InternViTConfig
from internvit.inference import linear_int8
from internvit.inference.emulate import emulate_int8, int8_violations
from internvit.inference.optimize import optimize_for_inference
from internvit.model.vit import InternViT
from internvit.numerics import DISTRIBUTIONS, product_violations, relative_error
from internvit.ops.backends.registry import backends_for
from internvit.ops.core.spec import Inputs, OpSpec, Size, every_spec


@dataclass(frozen=True)
class Result:
    """One line of the table: what ran, and what it broke of the contract."""

    what: str
    backend: str
    dtype: str
    shape: str
    failures: tuple[str, ...]
    error: float

    @property
    def passed(self) -> bool:
        return not self.failures


Outcome = tuple[list[str], float]
Check = tuple[str, str, str, str, Callable[[], Outcome]]


def _op(spec: OpSpec, variant: str, inputs: Inputs, backend: str) -> Outcome:
    arguments = spec.examples[variant](inputs)
    actual, truth = spec.run(arguments, backend), spec.truth(arguments)
    violations = spec.violations(arguments, actual, truth, spec.plain(arguments))
    return violations, _worst_error(actual, truth)


def _worst_error(actual: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """Of the outputs that do not cancel: sums of a centred weight are 0, and all that is computed of them rounding."""
    norms = [t.double().norm().item() for t in truth]
    pairs = zip(actual, truth, norms, strict=True)
    return max(relative_error(a, t) for a, t, norm in pairs if norm >= 1e-12 * max(norms))


def _gradients(backend: str, norm_type: str, device: str, generator: torch.Generator) -> Outcome:
    """A whole block's gradients on one backend in float32, against the reference's in float64."""
    config = _block_config(norm_type)
    truth_model = reference.InternViT(config)
    model = InternViT(config)
    model.load_state_dict(truth_model.state_dict())
    model.to(device)
    truth_model.double()
    pixels = torch.randn(2, 3, 42, 42, generator=generator)
    grads = []
    for m, x in ((model, pixels.to(device)), (truth_model, pixels.double())):
        with ops.backend(backend):
            loss = m(x).last_hidden_state.square().mean()
            grads.append(torch.autograd.grad(loss, list(m.parameters())))
    errors = [relative_error(a, b) for a, b in zip(*grads, strict=True)]
    worst = max(errors)
    return ([] if worst < 1e-4 else [f"relative error {worst:.2e} of a gradient, allowed 1e-04"]), worst


def _block_config(norm_type: str) -> InternViTConfig:
    qk_norm = norm_type == "rms_norm"
    sizes = {"image_size": 42, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    return InternViTConfig(
        **sizes,  # type: ignore[arg-type]
        num_hidden_layers=2,
        norm_type=norm_type,
        qkv_bias=not qk_norm,
        qk_normalization=qk_norm,
    )


def _model(backend: str, name: str, dtype: torch.dtype, device: str, generator: torch.Generator) -> Outcome:
    """Two layers of a published variant at its native size: the error against float64 is at most the reference's."""
    config = InternViTConfig.from_name(name, num_hidden_layers=2, drop_path_rate=0.0)
    plain = reference.InternViT(config).to(device, dtype).eval()
    model = InternViT(config, device=device, dtype=dtype).eval()
    model.load_state_dict(plain.state_dict())
    pixels = torch.randn(1, 3, *config.image_hw, generator=generator).to(device, dtype)
    with torch.no_grad(), ops.backend(backend):
        out, eager = model(pixels).last_hidden_state, plain(pixels).last_hidden_state
        truth = plain.double()(pixels.double()).last_hidden_state
    return product_violations(out, truth, eager, 2.0 if dtype == torch.float32 else 1.02), relative_error(out, truth)


def _int8_model(name: str, generator: torch.Generator) -> Outcome:
    """Two layers of a published variant with every Linear in int8, against an emulation of its operands."""
    config = InternViTConfig.from_name(name, num_hidden_layers=2, drop_path_rate=0.0)
    config = config.replace(initializer_factor=1.0)  # at 0.1 the branches, and int8's error, are lost in the stream
    model = InternViT(config, dtype=torch.bfloat16).eval()
    fast = optimize_for_inference(model, out_dtype=torch.float32, precision="int8", skip=())
    pixels = torch.randn(1, 3, *config.image_hw, generator=generator)
    with torch.no_grad():
        out = fast(pixels).last_hidden_state
        plain = optimize_for_inference(model, out_dtype=torch.float32)(pixels).last_hidden_state
        truth = emulate_int8(model, ())(pixels).last_hidden_state
        emulation = emulate_int8(model, fast.int8)(pixels).last_hidden_state
    return int8_violations(out, truth, plain, emulation), relative_error(out, truth)


def _op_checks(quick: bool, device: str, dtype: torch.dtype, generator: torch.Generator) -> Iterator[Check]:
    """Every op, variant and backend, by the specs: at both models' widths, on every distribution that an op is for."""
    tokens, name = 257 if quick else 1025, str(dtype).removeprefix("torch.")
    distributions = ("normal", "massive") if quick else DISTRIBUTIONS
    for spec in every_spec().values():
        if not spec.trains and spec.multiplies_matrices and dtype != torch.bfloat16:
            continue  # int8 and float8 operands are the same in any dtype
        for heads, head_dim in ((16, 64), (25, 128)):
            size = Size(1, tokens, heads, head_dim)
            for variant in spec.examples:
                for backend in backends_for(spec.implemented_as, device, dtype, head_dim, **spec.demands(variant)):
                    for distribution in ("normal",) if spec.multiplies_matrices else distributions:
                        if dtype == torch.float16 and spec.name == "linear_layer_scale":
                            continue  # refused where gamma * weight leaves the normal range
                        inputs = Inputs(size, generator, dtype, device, distribution, row_scale=False)
                        what = ", ".join(part for part in (spec.name, variant, distribution) if part)
                        run = functools.partial(_op, spec, variant, inputs, backend)
                        yield what, backend, name, str(size), run


def checks(
    quick: bool = False, device: str = "cpu", seed: int | None = None, precision: str | None = None
) -> Iterator[Check]:
    """What there is to check on this machine: (what, backend, dtype, shape, run); without `seed` on fresh data.

    With a precision, only models with Linears in it.

    Raises:
        ValueError: a precision that this machine or device does not have.
    """
    if precision is not None:
        yield from _precision_checks(precision, quick, device, seed)
        return
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16) if quick else (torch.float32, torch.bfloat16, torch.float16):
        yield from _op_checks(quick, device, dtype, generator)
    for backend in backends_for("rms_norm", device, torch.float32):
        for norm_type in ("rms_norm", "layer_norm"):
            run_gradients = functools.partial(_gradients, backend, norm_type, device, generator)
            yield f"gradients of a model ({norm_type})", backend, "float32", "2x10x128", run_gradients
    for variant in ("internvit-300m-448px",) if quick else ("internvit-300m-448px", "internvit-6b-448px-v2.5"):
        for dtype in (torch.float32, torch.bfloat16):
            run_model = functools.partial(_model, "auto", variant, dtype, device, generator)
            yield f"{variant}, 2 layers", "auto", str(dtype).removeprefix("torch."), "448x448", run_model


def _precision_checks(precision: str, quick: bool, device: str, seed: int | None) -> Iterator[Check]:
    reason = "no check of it yet" if precision != "int8" else linear_int8.unavailable_reason()
    if device != "cpu" or reason is not None:
        raise ValueError(f"precision: expected int8 on a CPU that has it, got {precision} on {device}: {reason}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    for name in ("internvit-300m-448px",) if quick else ("internvit-300m-448px", "internvit-6b-448px-v2.5"):
        yield f"{name}, 2 layers", "cpu", "int8", "448x448", functools.partial(_int8_model, name, generator)


def run(
    quick: bool = False, device: str = "cpu", seed: int | None = None, precision: str | None = None
) -> Iterator[Result]:
    """Runs every check; an exception is a failure of that check alone."""
    for what, backend, dtype, shape, call in checks(quick, device, seed, precision):
        try:
            failures, error = call()
        except Exception as problem:
            failures, error = [f"{type(problem).__name__}: {problem}"], float("nan")
        yield Result(what, backend, dtype, shape, tuple(failures), error)
