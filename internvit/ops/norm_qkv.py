"""`norm_linear` to q, k and v, with QK-norm's statistics, for inference.

    qkv = rstd * (x weight^T - mean * weight_sum) + bias
    rstd_q = 1 / sqrt(mean of q^2 + eps), over q's columns as rounded;  rstd_k alike

So `qk_norm_stats` does not read q and k again: `attention` takes its weights and these statistics.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from internvit.ops.backends.registry import implements
from internvit.ops.core import validation as check
from internvit.ops.core.norm_math import accumulate_dtype, statistics
from internvit.ops.core.registration import define
from internvit.ops.core.spec import Arguments, Inputs, OpSpec, register_inference_spec
from internvit.ops.norm_linear import _formula as norm_linear_formula
from internvit.ops.norm_linear import example, norm_linear_reference, sums_violations, validate_normed_operands

OP = "norm_qkv"


def token_statistics(qkv: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """rstd of q's and of k's columns."""
    q, k, _ = qkv.chunk(3, -1)
    return statistics(q, "rms_norm", eps)[1], statistics(k, "rms_norm", eps)[1]


@implements(OP, "reference")
def norm_qkv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None,
    weight_sum: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    qkv = norm_linear_reference(x, weight, bias, rstd, mean, weight_sum, False)
    return qkv, *token_statistics(qkv, eps)


def _validate(x: Tensor, weight: Tensor, *others: Any) -> None:
    *vectors, eps = others
    validate_normed_operands(OP, x, weight, *vectors)
    check.eps(OP, eps)
    if weight.shape[0] % 3 or weight.shape[0] == 0:
        raise ValueError(
            f"{OP}: weight must have rows for q, k and v, of one width, got shape {check.shape_of(weight)}"
        )


NORM_QKV = define(
    f"{OP}(Tensor x, Tensor weight, Tensor? bias, Tensor rstd, Tensor? mean, Tensor? weight_sum, float eps)"
    " -> (Tensor qkv, Tensor rstd_q, Tensor rstd_k)",
    fake=lambda x, weight, *_: (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        *(x.new_empty(x.shape[:-1], dtype=accumulate_dtype(x)) for _ in range(2)),
    ),
    validate=_validate,
    flops=lambda x, weight, *_, **__: 2 * prod(x) * weight[0],
)


def norm_qkv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rstd: Tensor,
    mean: Tensor | None = None,
    weight_sum: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A norm folded into the projection to q, k and v, and the statistics of QK-norm, for inference.

    qkv = rstd * (x weight^T - mean * weight_sum) + bias,  rstd_q = 1 / sqrt(mean of q^2 + eps);  rstd_k alike

    Args:
        x, weight, bias, rstd, mean, weight_sum: as for `norm_linear`, with M = 3 C.
        eps: of QK-norm.
        backend: overrides `internvit.backend`.

    Returns:
        qkv: [..., 3 C], x's dtype, contiguous; rstd_q and rstd_k: [...], float32 (float64 for float64 input).

    Raises:
        ValueError: a wrong shape, dtype or device. RuntimeError in backward: it has no derivative.
    """
    qkv, rstd_q, rstd_k = NORM_QKV.call((x, weight, bias, rstd, mean, weight_sum, eps), backend)
    return qkv, rstd_q, rstd_k


def _formula(*args: Any, eps: float = 1e-6, **named: Any) -> tuple[Tensor, ...]:
    qkv = norm_linear_formula(*args, **named)
    return qkv, *((t.square().mean(-1) + eps).rsqrt() for t in qkv.chunk(3, -1)[:2])


def _violations(arguments: Arguments, actual: tuple[Tensor, ...], truth: tuple[Tensor, ...], _: object) -> list[str]:
    qkv, *rstd = actual
    violations = sums_violations({n: a for n, a in arguments.items() if n != "eps"}, qkv, truth[0])
    for name, of, t in zip("qk", token_statistics(qkv.double(), arguments.get("eps", 1e-6)), rstd, strict=False):
        if not torch.allclose(t.double(), of, rtol=1e-5, atol=0):
            violations.append(f"rstd_{name} is not of the rounded {name}")
    return violations


def _example(make: Inputs, norm_type: str) -> Arguments:
    return example(make, norm_type, 3 * make.size.hidden_size)


register_inference_spec(
    OpSpec(
        norm_qkv,
        OP,
        _formula,
        {
            "rms_norm": lambda make: _example(make, "rms_norm"),
            "layer_norm": lambda make: _example(make, "layer_norm"),
        },
        _violations,
    )
)
