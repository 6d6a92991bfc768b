"""A branch's last Linear with LayerScale folded into its weight while both train, and the residual it is added to.

    y = residual + x weight'^T + bias',  weight' = gamma * weight,  bias' = gamma * bias

x [..., K] of dtype T; weight [M, K], bias [M], gamma [M], T or float32; residual [..., M], T or float32, or None; y has
residual's dtype, x's without it. LayerScale as a pass of its own
keeps the branch [N, C] for gamma's gradient; here that comes from the weight's, and backward rebuilds weight' instead
of keeping it (kept, it would be 5 units of [N, C] a block of the 300M at one image, 16 of the 6B):

    grad_weight' = grad_y^T x,            grad_bias' = sum over rows of grad_y
    grad_weight  = gamma * grad_weight',  grad_bias  = gamma * grad_bias'
    grad_gamma   = sum over K of grad_weight' * weight, + grad_bias' * bias

One op, so that nothing that traces through it decides to keep weight'. The residual is for GEMMs that add it in their
epilogue (`adds_residual`), without gradients: a pass less of [N, C]. While training, `layer_scale_residual_norm` takes
as few: its backward adds the residual's gradient to the norm's.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.numerics import product_violations
from internvit.ops.backends.registry import implementation, implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, sum_rows
from internvit.ops.core.registration import Mask, define, define_backward, fill_gradients
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import Inputs, OpSpec, register_spec
from internvit.ops.linear import linear, matmul

OP = "linear_layer_scale"
_PIECE = {"cpu": 1 << 18}
"""Products of weights that are in float32 at once: what a core's cache holds; elsewhere 1 << 24, for few launches."""


def float16_holds(folded: Tensor, weight: Tensor) -> bool:
    """Whether gamma * weight (float32 or wider) stays in float16's normal range wherever weight is in it."""
    limits, magnitude = torch.finfo(torch.float16), folded.abs()
    underflows = (magnitude < limits.tiny) & (magnitude > 0) & (weight.abs() >= limits.tiny)
    return not bool(underflows.any() | (magnitude > limits.max).any())


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """sum over the columns of a * b, [M], in the accumulation dtype."""
    dtype = accumulate_dtype(a, b)
    rows = max(1, _PIECE.get(a.device.type, 1 << 24) // a.shape[1])
    pairs = zip(a.split(rows), b.split(rows), strict=True)
    return torch.cat([(x.to(dtype) * y.to(dtype)).sum(-1) for x, y in pairs])


@implements(OP, "reference")
def linear_layer_scale_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, residual: Tensor | None
) -> Tensor:
    wide = weight.float() if x.dtype == torch.float16 else weight
    folded = wide * gamma.unsqueeze(1)
    if x.dtype == torch.float16 and not float16_holds(folded, weight):
        raise ValueError(
            f"{OP}: gamma * weight leaves float16's normal range (gamma down to {gamma.abs().min().item():.1e}), where "
            "it loses bits; keep LayerScale out of the Linear, or train in bfloat16"
        )
    y = linear(x, folded.to(x.dtype), None if bias is None else (bias * gamma).to(x.dtype), "reference")
    return y if residual is None else (residual + y).contiguous()


@implements(f"{OP}_backward", "reference")
def linear_layer_scale_backward_reference(
    grad_y: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    x_dtype: torch.dtype,
    output_mask: Mask,
) -> tuple[Tensor | None, ...]:
    grad_x = grad_weight = grad_bias = grad_gamma = None
    grad_y = grad_y.to(x_dtype)
    column = gamma.unsqueeze(1)
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    if output_mask[0]:
        grad_x = matmul(grad_y, (weight * column).to(grad_y.dtype))
    if output_mask[1] or output_mask[3]:
        assert x is not None
        grad_folded = matmul(rows.t(), x.reshape(-1, x.shape[-1]))
        if output_mask[3]:
            grad_gamma = _row_dots(grad_folded, weight)
        if output_mask[1]:
            # In place where no precision is lost: fresh pages cost more than the product, 40 ms against 5 for a 6B's.
            same = grad_folded.dtype == weight.dtype
            grad_weight = grad_folded.mul_(column) if same else (grad_folded * column).to(weight.dtype)
    if bias is not None and (output_mask[2] or output_mask[3]):
        grad_folded_bias = sum_rows(rows.to(accumulate_dtype(rows)))
        if output_mask[3]:
            assert grad_gamma is not None
            grad_gamma = grad_gamma + grad_folded_bias * bias
        if output_mask[2]:
            grad_bias = (grad_folded_bias * gamma).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, None if grad_gamma is None else grad_gamma.to(gamma.dtype)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, residual: Tensor | None, backend: str
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return implementation(OP, backend)(x, weight, bias, gamma, residual)


def _run_backward(grad_y: Tensor, *args: Any) -> Any:
    with torch.autocast(grad_y.device.type, enabled=False):
        return fill_gradients(implementation(f"{OP}_backward", args[-1])(grad_y, *args[:-1]), grad_y)


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, residual: Tensor | None) -> None:
    check.rows(OP, "x", x)
    check.floating(OP, x=x, weight=weight, bias=bias, gamma=gamma, residual=residual)
    check.device(OP, "x", x, weight=weight, bias=bias, gamma=gamma, residual=residual)
    check.linear_weight(OP, x, weight)
    for name, t in (("weight", weight), ("gamma", gamma)):
        if t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{OP}: {name} must have x's dtype {x.dtype} or be torch.float32, got {t.dtype}")
    check.vector(OP, "bias", bias, weight.shape[0], "weight's rows")
    check.vector(OP, "gamma", gamma, weight.shape[0], "weight's rows")
    check.bias(OP, bias, weight)
    if residual is not None:
        shape = [*x.shape[:-1], weight.shape[0]]
        if list(residual.shape) != shape:
            raise ValueError(f"{OP}: residual must have shape {shape}, got {list(residual.shape)}")
        if residual.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{OP}: residual must have x's dtype {x.dtype} or be torch.float32, got {residual.dtype}")


def _validate_backward(  # type: ignore[no-untyped-def]
    grad_y, x, weight, bias, gamma, x_dtype, output_mask, backend
) -> None:
    op = f"{OP}_backward"
    check.output_mask(op, output_mask, 4)
    check.rows(op, "grad_y", grad_y)
    check.floating(op, grad_y=grad_y, weight=weight)
    check.linear_backward(op, "grad_y", grad_y, x, weight, output_mask[1] or output_mask[3], x_dtype)
    check.parameters(op, "grad_y", grad_y, weight.shape[0], "weight's rows", bias=bias, gamma=gamma)
    check.bias(op, bias, weight)


def _like_x(named: dict[str, Any]) -> Tensor:
    grad_y = named["grad_y"]
    return grad_y.new_empty((*grad_y.shape[:-1], named["weight"].shape[1]), dtype=named["x_dtype"])


def _fake(x, weight, bias, gamma, residual, backend):  # type: ignore[no-untyped-def]
    return (x if residual is None else residual).new_empty((*x.shape[:-1], weight.shape[0]))


LINEAR_LAYER_SCALE = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor? residual) -> Tensor y",
    fake=_fake,
    validate=_validate,
    run=_run,
    autocast=("x",),
    flops=lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
)
define_backward(
    LINEAR_LAYER_SCALE,
    f"{OP}_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor? bias, Tensor gamma, ScalarType x_dtype,"
    " bool[4] output_mask) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_gamma)",
    validate=_validate_backward,
    grads_like={"grad_x": _like_x},
    run=_run_backward,
    saved_for={"x": ("weight", "gamma")},
    passes_through="residual",
    flops=lambda grad_y, x, weight, bias, gamma, dtype, mask, *_, **__: (
        2 * prod(grad_y) * weight[1] * (bool(mask[0]) + bool(mask[1] or mask[3]))
    ),
)


def adds_residual(weight: Tensor) -> bool:
    """Whether the backend in force adds the residual in the epilogue of its GEMM with `weight`."""
    return resolve(OP, weight) != "reference"


def linear_layer_scale(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """A Linear whose output LayerScale multiplies, as one GEMM, for training: no output is kept for gamma's gradient.

    y = residual + x (gamma * weight)^T + gamma * bias

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; under autocast cast as for torch's Linear.
        weight: [M, K], x's dtype or float32.
        gamma: [M], x's dtype or float32, LayerScale.
        bias: [M], weight's dtype, or None.
        residual: [..., M], x's dtype or float32, or None.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], residual's dtype, x's without one. DropPath's factor belongs behind it (`layer_scale_residual` with
            gamma=None).

    Raises:
        ValueError: a wrong shape, dtype or device; float16 in which gamma * weight leaves the normal range.

    Source: LightLLM folds for inference; LayerScale is Touvron et al. 2021, https://arxiv.org/abs/2103.17239.
    """
    return LINEAR_LAYER_SCALE.call((x, weight, bias, gamma, residual), backend)


def _formula(
    x: Tensor, weight: Tensor, gamma: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    y = F.linear(x, weight, bias) * gamma
    return y if residual is None else residual + y


def _violations(arguments: dict[str, Any], actual: tuple[Tensor, ...], truth: Any, eager: Any) -> list[str]:
    """In 16 bit the folded weight is the operand that is rounded, and the Linear's output before the residual."""
    x, weight, gamma, bias, residual = (arguments.get(n) for n in ("x", "weight", "gamma", "bias", "residual"))
    emulation = eager[0]
    if x.dtype != torch.float32:  # type: ignore[union-attr]
        folded_bias = None if bias is None else (bias * gamma).double()
        emulation = F.linear(x.double(), (weight * gamma[:, None]).double(), folded_bias).to(x.dtype)  # type: ignore
        emulation = emulation if residual is None else residual + emulation
    return product_violations(actual[0], truth[0], emulation)


def _example(make: Inputs) -> dict[str, Any]:
    hidden = make.size.hidden_size
    weight, gamma = make.matrix(hidden, 4 * hidden), make.vector()
    return {
        "x": make.hidden_states(4 * hidden),
        # gamma * weight is at least 1e-4 in magnitude: within float16's normal range, which begins at 6e-5.
        "weight": torch.copysign(weight.abs().clamp_min(2e-3), weight),
        "gamma": torch.copysign(0.05 + gamma.abs(), gamma),
        "bias": make.vector(),
    }


def _with_residual(make: Inputs) -> dict[str, Any]:
    return {**_example(make), "residual": make.hidden_states()}


register_spec(OpSpec(linear_layer_scale, OP, _formula, {"": _example, "residual": _with_residual}, _violations))
