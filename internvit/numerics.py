"""The numerics contract as code: the data an op is tried on, and the bounds its result must keep against float64.

Tests, benchmarks and `internvit check` use these same functions, so a kernel that is fast and wrong is not reported.

* Norm-type outputs in 16 bit: every element within one ulp of the correctly rounded truth, at least 99 % equal to it.
* float32: relative error at most twice eager PyTorch's.
* Attention- and GEMM-type outputs in 16 bit: relative error at most 1.1 times that of a float64 emulation which rounds
  only the stated operands, the probabilities and the output.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

DISTRIBUTIONS = ("normal", "massive", "near_zero", "large_mean", "near_overflow")


def sample(
    shape: tuple[int, ...], distribution: str, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """Fresh random activations [..., C] of one of `DISTRIBUTIONS`.

    massive: three channels a thousand times larger, as trained ViTs have; near_zero: rows of 1e-4; large_mean: 30 + x;
    near_overflow: up to 6e4 in float16, 1e17 in wider dtypes.
    """
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if distribution == "massive":
        for channel in (0, shape[-1] // 3, shape[-1] - 1):
            x[..., channel] *= 1000
    elif distribution == "near_zero":
        x *= 1e-4
    elif distribution == "large_mean":
        x += 30
    elif distribution == "near_overflow":
        x = x.clamp(-3, 3) * (2e4 if dtype == torch.float16 else 3e16)
    elif distribution != "normal":
        raise ValueError(f"distribution: expected one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    return x.to(dtype).to(device)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """||actual - truth|| / ||truth|| in float64; 0 for empty tensors, infinite where actual is not finite."""
    if truth.numel() == 0:
        return 0.0
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if not actual.isfinite().all():
        return float("inf")
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    norm = (truth / scale).norm().item()
    return ((actual - truth) / scale).norm().item() / norm if norm else float((actual != 0).any())


def ulp_distance(a: Tensor, b: Tensor) -> Tensor:
    """How many representable 16-bit values lie between the elements of a and b (of one dtype)."""
    ordered = []
    for t in (a, b):
        bits = t.detach().contiguous().cpu().view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ordered[0] - ordered[1]).abs()


def layer_norm_terms(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """What float32 rounds on the way to a LayerNorm's output, per element in float64: `magnitude` of `norm_violations`.

    (|x| + |mean| + mean|x - mean|) * rstd * |weight| + |bias|: the mean's error is one of the whole row's values, which
    an element next to the mean has none of.
    """
    x, weight, bias = x.double(), weight.double(), bias.double()
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    spread = centred.abs().mean(-1, keepdim=True)
    return (x.abs() + mean.abs() + spread) * rstd * weight.abs() + bias.abs()


def _failures(actual: Tensor, truth: Tensor) -> Iterator[str]:
    if actual.shape != truth.shape:
        yield f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    elif not actual.isfinite().all():
        yield f"{int((~actual.isfinite()).sum())} of {actual.numel()} elements are not finite"


def norm_violations(
    actual: Tensor,
    truth: Tensor,
    eager: Tensor | None = None,
    magnitude: Tensor | None = None,
    condition: float = 1.0,
    roundings: float = 8,
) -> list[str]:
    """What a norm-type result breaks of the contract; empty when it keeps it.

    Args:
        actual: the result, in its storage dtype.
        truth: the float64 truth, computed from the same rounded inputs.
        eager: eager PyTorch's float32 result, the measure for float32.
        magnitude: per element the sum of the absolute terms (`layer_norm_terms`): where they cancel, float32 arithmetic
            errs by a few of its own roundings of them, however small the sum. For LayerNorm half a rounding each for
            two differences, two products, the sum and the mean, 1 for rstd: 4 where sums are trees, as Triton's
            (measured: 2.5); a chain of additions, as a CPU's lanes, errs by more of massive channels (measured: 6.9).
        condition: |mean| / standard deviation of a LayerNorm's input where it is large: a mean rounded to float32
            costs that many roundings, and on few rows eager's own may be lucky.
        roundings: how many roundings of `magnitude` float32 arithmetic may be off; 8 is a LayerNorm's on any backend.
    """
    failures = list(_failures(actual, truth))
    if failures or actual.numel() == 0:
        return failures
    float32_eps = torch.finfo(torch.float32).eps
    if actual.dtype in (torch.bfloat16, torch.float16):
        distance = ulp_distance(actual, truth.to(actual.dtype))
        excused = torch.zeros_like(distance, dtype=torch.bool)
        if magnitude is not None:
            exact, finfo = truth.double().cpu(), torch.finfo(actual.dtype)
            half_ulp = (exact.abs() * finfo.eps).clamp_min(finfo.smallest_normal * finfo.eps) / 2
            allowed_error = roundings * float32_eps * magnitude.double().cpu() + half_ulp
            excused = (actual.double().cpu() - exact).abs() <= allowed_error
        far = (distance > 1) & ~excused
        if far.any():
            failures.append(f"{int(far.sum())} elements are off by up to {int(distance[far].max())} ulp, allowed 1")
        differing = int(((distance > 0) & ~excused).sum())
        if differing > max(0.01 * actual.numel(), 2):
            failures.append(f"{differing} of {actual.numel()} elements are not correctly rounded, allowed 1 %")
        return failures
    error = relative_error(actual, truth)
    allowed = 2 * relative_error(eager, truth) if eager is not None else 0.0
    allowed = max(allowed, 2 * torch.finfo(actual.dtype).eps * max(condition, 1.0))
    if error > allowed:
        failures.append(f"relative error {error:.2e}, allowed {allowed:.2e}")
    return failures


def product_violations(actual: Tensor, truth: Tensor, emulation: Tensor, factor: float | None = None) -> list[str]:
    """What an attention- or GEMM-type result breaks of the contract; empty when it keeps it.

    Args:
        actual: the result, in its storage dtype.
        truth: the float64 truth, computed from the same rounded inputs.
        emulation: 16 bit: float64 with only the stated operands and the output rounded; float32: eager's result.
        factor: how many times the emulation's error is allowed: 1.1 in 16 bit, 2 in float32 by default.
    """
    failures = list(_failures(actual, truth))
    if failures or actual.numel() == 0:
        return failures
    wide = actual.dtype in (torch.float32, torch.float64)
    error = relative_error(actual, truth)
    allowed = max(
        (factor or (2.0 if wide else 1.1)) * relative_error(emulation, truth), torch.finfo(actual.dtype).eps / 2
    )
    if error > allowed:
        failures.append(f"relative error {error:.2e}, allowed {allowed:.2e}")
    return failures
