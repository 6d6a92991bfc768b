"""A branch's last Linear with LayerScale folded into its weight while both train.

    y = x weight'^T + bias',  weight' = gamma * weight,  bias' = gamma * bias        (= gamma * (x weight^T + bias))

x, y [..., K], [..., M] of dtype T; weight [M, K], bias [M], gamma [M], T or float32. LayerScale as a pass of its own
keeps the branch [N, C] for gamma's gradient; here that comes from the weight's, and backward rebuilds weight' instead
of keeping it (kept, it would be 5 units of [N, C] a block of the 300M at one image, 16 of the 6B):

    grad_weight' = grad_y^T x,            grad_bias' = sum over rows of grad_y
    grad_weight  = gamma * grad_weight',  grad_bias  = gamma * grad_bias'
    grad_gamma   = sum over K of grad_weight' * weight, + grad_bias' * bias

One op, so that nothing that traces through it decides to keep weight'.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from internvit.ops.attention import autocast
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, sum_rows
from internvit.ops.core.registration import Mask, below_autograd, define, empty_grad, wanted
from internvit.ops.core.select import implementation, reference, resolve
from internvit.ops.linear import linear

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


@reference(OP)
def linear_layer_scale_reference(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor) -> Tensor:
    wide = weight.float() if x.dtype == torch.float16 else weight
    folded = wide * gamma.unsqueeze(1)
    if x.dtype == torch.float16 and not float16_holds(folded, weight):
        raise ValueError(
            f"{OP}: gamma * weight leaves float16's normal range (gamma down to {gamma.abs().min().item():.1e}), where "
            "it loses bits; keep LayerScale out of the Linear, or train in bfloat16"
        )
    return linear(x, folded.to(x.dtype), None if bias is None else (bias * gamma).to(x.dtype))


@reference(f"{OP}_backward")
def linear_layer_scale_backward_reference(
    grad_y: Tensor, x: Tensor | None, weight: Tensor, bias: Tensor | None, gamma: Tensor, output_mask: Mask
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias, grad_gamma = (empty_grad(grad_y) for _ in range(4))
    column = gamma.unsqueeze(1)
    rows = grad_y.reshape(-1, grad_y.shape[-1])
    if output_mask[0]:
        grad_x = grad_y @ (weight * column).to(grad_y.dtype)
    if output_mask[1] or output_mask[3]:
        assert x is not None
        grad_folded = rows.t() @ x.reshape(-1, x.shape[-1])
        if output_mask[3]:
            grad_gamma = _row_dots(grad_folded, weight)
        if output_mask[1]:
            # In place where no precision is lost: fresh pages cost more than the product, 40 ms against 5 for a 6B's.
            same = grad_folded.dtype == weight.dtype
            grad_weight = grad_folded.mul_(column) if same else (grad_folded * column).to(weight.dtype)
    if bias is not None and (output_mask[2] or output_mask[3]):
        grad_folded_bias = sum_rows(rows.to(accumulate_dtype(rows)))
        if output_mask[3]:
            grad_gamma = grad_gamma + grad_folded_bias * bias
        if output_mask[2]:
            grad_bias = (grad_folded_bias * gamma).to(bias.dtype)
    return grad_x, grad_weight, grad_bias, grad_gamma.to(gamma.dtype) if output_mask[3] else grad_gamma


class LinearLayerScaleFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, backend: str) -> Tensor:
        y = below_autograd(LINEAR_LAYER_SCALE, x, weight, bias, gamma, backend)
        needs_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if needs_x else None, weight, bias, gamma)
        ctx.backend = backend
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        mask = ctx.needs_input_grad[:4]
        return (*wanted(LINEAR_LAYER_SCALE_BACKWARD(grad_y, *ctx.saved_tensors, mask, ctx.backend), mask), None)


def _run(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, backend: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return implementation(OP, backend)(x, weight, bias, gamma)


def _run_backward(grad_y: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(grad_y.device.type, enabled=False):
        return implementation(f"{OP}_backward", args[-1])(grad_y, *args[:-1])


def _fake_backward(grad_y, x, weight, bias, gamma, output_mask, backend):  # type: ignore[no-untyped-def]
    shapes = (
        (grad_y, (*grad_y.shape[:-1], weight.shape[1])),
        *((t, None if t is None else t.shape) for t in (weight, bias, gamma)),
    )
    return tuple(
        like.new_empty(shape) if asked else empty_grad(grad_y)
        for (like, shape), asked in zip(shapes, output_mask, strict=True)
    )


LINEAR_LAYER_SCALE = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, str backend) -> Tensor y",
    fake=lambda x, weight, bias, gamma, backend: x.new_empty((*x.shape[:-1], weight.shape[0])),
    run=_run,
    autograd=LinearLayerScaleFunction,
)
LINEAR_LAYER_SCALE_BACKWARD = define(
    f"{OP}_backward(Tensor grad_y, Tensor? x, Tensor weight, Tensor? bias, Tensor gamma, bool[4] output_mask,"
    " str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_gamma)",
    fake=_fake_backward,
    run=_run_backward,
)


def linear_layer_scale(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, backend: str | None = None
) -> Tensor:
    """A Linear whose output LayerScale multiplies, as one GEMM, for training: no output is kept for gamma's gradient.

    y = x (gamma * weight)^T + gamma * bias

    Args:
        x: [..., K], float32, bfloat16, float16 or float64; under autocast float32 is cast as for torch's Linear.
        weight: [M, K], x's dtype or float32.
        bias: [M], weight's dtype, or None.
        gamma: [M], x's dtype or float32, LayerScale.
        backend: overrides `internvit.backend`.

    Returns:
        y: [..., M], x's dtype. DropPath's factor belongs behind it (`layer_scale_residual` with gamma=None).

    Raises:
        ValueError: a wrong shape, dtype or device; float16 in which gamma * weight leaves the normal range.

    Source: LightLLM folds for inference; LayerScale is Touvron et al. 2021, https://arxiv.org/abs/2103.17239.
    """
    check.rows(OP, "x", x)
    (x,) = autocast(x)  # type: ignore[assignment]
    check.floating(OP, x=x, weight=weight, bias=bias, gamma=gamma)
    check.device(OP, "x", x, weight=weight, bias=bias, gamma=gamma)
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"{OP}: weight must have shape [M, {x.shape[-1]}] (x's last dimension), got {check.shape_of(weight)}"
        )
    for name, t in (("weight", weight), ("gamma", gamma)):
        if t.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{OP}: {name} must have x's dtype {x.dtype} or be torch.float32, got {t.dtype}")
    check.vector(OP, "bias", bias, weight.shape[0], "weight's rows")
    check.vector(OP, "gamma", gamma, weight.shape[0], "weight's rows")
    if bias is not None:
        check.same_dtype(OP, "weight", weight, bias=bias)
    return LINEAR_LAYER_SCALE(x, weight, bias, gamma, resolve(OP, x, backend))
