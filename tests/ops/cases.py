"""One case per op: how to make its arguments, how to call it, and which arguments have gradients.

`make` gives float64 arguments on small odd shapes; `call` takes them in any dtype and returns a tuple of tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from internvit import ops
from internvit.ops.core.select import BACKENDS, implements
from internvit.ops.linear_gelu import gelu

Arguments = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[torch.Generator], Arguments]
    call: Callable[..., tuple[Tensor, ...]]
    batched: tuple[str, ...]  # arguments whose first dimension is the image

    def __str__(self) -> str:
        return self.name

    def run(self, arguments: Arguments, backend: str | None = None) -> tuple[Tensor, ...]:
        out = self.call(**arguments, backend=backend)
        return out if isinstance(out, tuple) else (out,)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _rows(generator: torch.Generator, *names: str, batch: int = 2, tokens: int = 3, width: int = 8) -> Arguments:
    """x-like names get [B, N, C], others [C]."""
    wide = ("x", "residual", "branch")
    return {n: _randn(generator, *((batch, tokens, width) if n in wide else (width,))) for n in names}


def _heads(generator: torch.Generator, *names: str, batch: int = 2, tokens: int = 5) -> Arguments:
    """q, k, v get [B, N, 2, 8]; weights [16]."""
    return {n: _randn(generator, *((batch, tokens, 2, 8) if n in ("q", "k", "v") else (16,))) for n in names}


def _attention_with_statistics(q, k, v, q_weight, k_weight, backend=None):
    rstd_q, rstd_k = ops.qk_norm_stats(q, k, backend=_norm_backend(backend))
    return ops.attention(q, k, v, None, q_weight, k_weight, rstd_q, rstd_k, backend=_norm_backend(backend))


def _norm_backend(backend: str | None) -> str | None:
    return "reference" if backend and not BACKENDS[backend].folds_qk_norm else backend


def _packed(qkv, q_weight, k_weight, rounding="fused", backend=None):
    return ops.qk_norm_attention(qkv, None, None, q_weight, k_weight, rounding=rounding, backend=backend)


def _seam(kind: str) -> Callable:
    def call(residual, branch, gamma, weight, bias=None, backend=None):
        row_scale = torch.tensor([0.0, 1.25, 1.0])[: residual.shape[0]]
        return ops.layer_scale_residual_norm(
            residual, branch, gamma, row_scale, weight, bias, kind=kind, backend=backend
        )

    return call


def _residual(residual, branch, gamma, backend=None):
    return ops.layer_scale_residual(residual, branch, gamma, torch.tensor([1.25, 0.0])[: len(residual)], backend)


def _linear_arguments(generator: torch.Generator) -> Arguments:
    return {**_rows(generator, "x"), "weight": _randn(generator, 6, 8), "bias": _randn(generator, 6)}


def _packed_arguments(generator: torch.Generator) -> Arguments:
    return {"qkv": _randn(generator, 2, 5, 3, 2, 8), **_heads(generator, "q_weight", "k_weight")}


CASES = (
    Case("rms_norm", lambda g: _rows(g, "x", "weight"), ops.rms_norm, ("x",)),
    Case("layer_norm", lambda g: _rows(g, "x", "weight", "bias"), ops.layer_norm, ("x",)),
    Case("layer_scale_residual", lambda g: _rows(g, "residual", "branch", "gamma"), _residual, ("residual", "branch")),
    Case(
        "layer_scale_residual_norm-rms_norm",
        lambda g: _rows(g, "residual", "branch", "gamma", "weight"),
        _seam("rms_norm"),
        ("residual", "branch"),
    ),
    Case(
        "layer_scale_residual_norm-layer_norm",
        lambda g: _rows(g, "residual", "branch", "gamma", "weight", "bias"),
        _seam("layer_norm"),
        ("residual", "branch"),
    ),
    Case("qk_norm_stats", lambda g: _heads(g, "q", "k"), ops.qk_norm_stats, ("q", "k")),
    Case("qk_norm", lambda g: _heads(g, "q", "k", "q_weight", "k_weight"), ops.qk_norm, ("q", "k")),
    Case("attention", lambda g: _heads(g, "q", "k", "v"), ops.attention, ("q", "k", "v")),
    Case(
        "attention-qk_norm",
        lambda g: _heads(g, "q", "k", "v", "q_weight", "k_weight"),
        _attention_with_statistics,
        ("q", "k", "v"),
    ),
    Case(
        "qk_norm_attention",
        lambda g: _heads(g, "q", "k", "v", "q_weight", "k_weight"),
        ops.qk_norm_attention,
        ("q", "k", "v"),
    ),
    Case("qk_norm_attention_packed", _packed_arguments, _packed, ("qkv",)),
    Case(
        "qk_norm_attention_packed-reference",
        _packed_arguments,
        lambda **kwargs: _packed(**kwargs, rounding="reference"),
        ("qkv",),
    ),
    Case("linear_gelu", _linear_arguments, ops.linear_gelu, ("x",)),
    Case("gelu", lambda g: {"pre_activation": _randn(g, 2, 5, 6)}, gelu, ("pre_activation",)),
    Case(
        "linear_layer_scale",
        lambda g: {**_linear_arguments(g), "gamma": 1 + _randn(g, 6).abs()},
        ops.linear_layer_scale,
        ("x",),
    ),
)


def backends_here(op: str) -> list[str]:
    """The backends that can run `op` on CPU tensors on this machine."""
    file = op.split("-")[0].removesuffix("_packed")
    file = "attention" if "attention" in file else file
    names = [n for n, b in BACKENDS.items() if b.missing() is None and b.rejects("cpu", torch.float32, 8) is None]
    return [n for n in names if implements(file, n)]


CASES_AND_BACKENDS = [(case, backend) for case in CASES for backend in backends_here(case.name)]
