"""Times attention with QK-norm inside, by this package's kernels, beside QK-norm written and a library's attention.

    fused:  qk_norm_stats, attention with the norm on tiles in registers
    flash:  qk_norm writes q_hat and k_hat, then flash-attn 2, 3, 4 or cuDNN, whichever backend `flash` takes here

The library has to be faster in a forward and in a forward with backward, each by 2 %, as exact as the fused op, and
deterministic: cuDNN's backward is not; it is timed and never chosen. Unmeasured: no GPU has run this yet.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from internvit import InternViTConfig, ops
from internvit.kernels.attention.config import attention_config
from internvit.kernels.common.config import TunedBackend, measured_configs
from internvit.kernels.common.rows import row_config
from internvit.numerics import relative_error
from internvit.ops.backends import flash
from internvit.ops.backends.registry import BACKENDS
from internvit.ops.core.fallback import describe
from internvit.ops.core.spec import SPECS
from internvit.ops.core.tuned import OP as OP

FUSED = "triton"
PACKED = "qk_norm_attention_qkvpacked"
Measure = Callable[[Mapping[Any, Callable[[], Any]], str], dict[Any, float]]


def _inputs(config: InternViTConfig, batch: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """A packed projection [B, N, 3, H, D] and QK-norm's weights, of a model's own size."""
    qkv = torch.randn(batch, config.num_tokens, 3, config.num_attention_heads, config.head_dim, device=device)
    weights = (1 + 0.1 * torch.randn(config.hidden_size, device=device) for _ in range(2))
    return [t.to(dtype).requires_grad_() for t in (qkv, *weights)]


def _results(inputs: list[Tensor], run: Callable[..., Tensor]) -> list[Tensor]:
    """The output and the gradients of the sum of its squares."""
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)]


def _forward(inputs: list[Tensor], run: Callable[..., Tensor]) -> Tensor:
    with torch.no_grad():
        return run(*inputs)


def _is_as_exact(inputs: list[Tensor], fused: Callable[..., Tensor], library: Callable[..., Tensor]) -> bool:
    """Whether each result of the library is as near to the formula in float32 as the fused op's, up to a tenth, or as
    the formula in the inputs' dtype: the tolerance of the fused op itself."""

    def formula(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        result: Tensor = SPECS[PACKED].formula(qkv=qkv, q_weight=q_weight, k_weight=k_weight)
        return result

    exact = _results([t.detach().float().requires_grad_() for t in inputs], formula)
    errors = [map(relative_error, _results(inputs, run), exact) for run in (library, fused, formula)]
    return all(one <= max(1.1 * ours, 1.02 * eager) for one, ours, eager in zip(*errors, strict=True))


class Library(NamedTuple):
    """What a backend's attention runs, and whether its backward gives the same bits each time."""

    name: str
    deterministic: bool


def library_of(backend: str, head_dim: int, dtype: torch.dtype, device: str) -> Library | None:
    """None where `backend` does not run here."""
    if backend != "flash":
        return Library(backend, True)
    if BACKENDS[backend].unavailable_reason() or BACKENDS[backend].unsupported_reason(device, dtype, head_dim):
        return None
    library = flash.library_of(torch.cuda.current_device(), head_dim)
    return None if library is None else Library(library.name, library.deterministic)


def faster_backend(
    config: InternViTConfig,
    dtype: torch.dtype,
    device: str,
    batch: int,
    measure: Measure,
    configs: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> tuple[TunedBackend | None, str]:
    """The library that beats the fused op, tuned as `configs` say, at a model's size, if one does; and a line about it.

    On a CPU, where it is rehearsed, `sdpa` stands in for the libraries. A library that fails is named in the line.
    """
    backend = "flash" if device == "cuda" else "sdpa"
    library = library_of(backend, config.head_dim, dtype, device)
    if library is None:
        return None, "no library runs here"
    for cached in (attention_config, row_config):
        cached.cache_clear()
    try:
        with measured_configs(configs):
            times = _times(config, dtype, device, batch, measure, backend)
    except Exception as error:
        return None, f"beside {library.name}: {describe(error)}"
    finally:
        for cached in (attention_config, row_config):
            cached.cache_clear()
    if times is None:
        return None, f"{library.name} is less exact"
    line = "; ".join(f"{kind} {fused:.3f} ms fused, {other:.3f} ms {library.name}" for kind, fused, other in times)
    if not library.deterministic:
        return None, f"{line}, whose backward is not deterministic"
    return TunedBackend(backend, library.name) if all(b < 0.98 * a for _, a, b in times) else None, line


def _times(
    config: InternViTConfig, dtype: torch.dtype, device: str, batch: int, measure: Measure, backend: str
) -> list[tuple[str, float, float]] | None:
    """Milliseconds of the fused op and of `backend`, in a forward and in training; None where it is less exact."""
    run = {each: functools.partial(ops.qk_norm_attention_qkvpacked, backend=each) for each in (FUSED, backend)}
    if not _is_as_exact(_inputs(config, 1, dtype, device), *run.values()):
        return None
    inputs = _inputs(config, batch, dtype, device)
    kinds = {"forward": _forward, "training": _results}
    timed = {(kind, each): functools.partial(kinds[kind], inputs, run[each]) for kind in kinds for each in run}
    times = measure(timed, device)
    return [(kind, times[kind, FUSED], times[kind, backend]) for kind in kinds]
