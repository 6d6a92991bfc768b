"""The exact GELU, as `linear_gelu` applies it.

    y = z / 2 * (1 + erf(z / sqrt(2)))

z, y [...] of dtype T, computed in float32. An op of its own for what follows a Linear that is not plain, and for
recomputing `linear_gelu`'s output from its pre-activation: the same bits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.registration import define, define_backward
from internvit.ops.core.spec import OpSpec, multiplies, register_spec


@implements("gelu", "reference")
def gelu_reference(pre_activation: Tensor) -> Tensor:
    return F.gelu(pre_activation.contiguous())


@implements("gelu_backward", "reference")
def gelu_backward_reference(grad_y: Tensor, pre_activation: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad_y.contiguous(), pre_activation.contiguous())


def _validate_backward(grad_y: Tensor, pre_activation: Tensor, backend: str) -> None:
    check.floating("gelu_backward", pre_activation=pre_activation)
    check.like("gelu_backward", "pre_activation", pre_activation, grad_y=grad_y)


GELU = define(
    "gelu(Tensor pre_activation) -> Tensor y",
    fake=lambda pre_activation, backend: pre_activation.new_empty(pre_activation.shape),
    validate=lambda pre_activation: check.floating("gelu", pre_activation=pre_activation),
    compiled=("cpu", "cuda"),
)
GELU_BACKWARD = define_backward(
    GELU,
    "gelu_backward(Tensor grad_y, Tensor pre_activation) -> Tensor grad_pre_activation",
    validate=_validate_backward,
)


def gelu(pre_activation: Tensor, *, backend: str | None = None) -> Tensor:
    """The exact (erf) GELU.

    y = z / 2 * (1 + erf(z / sqrt(2)))

    Args:
        pre_activation: z [...], float32, bfloat16, float16 or float64.
        backend: overrides `internvit.backend`.

    Returns:
        y: [...], z's dtype, contiguous.

    Raises:
        ValueError: a wrong dtype.

    Source: Hendrycks & Gimpel 2016, https://arxiv.org/abs/1606.08415.
    """
    return GELU.call((pre_activation,), backend)


register_spec(
    OpSpec(
        gelu,
        "gelu",
        lambda pre_activation: F.gelu(pre_activation),
        {"": lambda make: {"pre_activation": make.hidden_states()}},
        multiplies,
    )
)
