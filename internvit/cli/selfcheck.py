"""The correctness suite for people without the checkout: every op and backend and a whole model against float64.

Each check makes fresh random data, runs an op on one backend and asks `internvit.numerics` what it breaks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import ops, reference
from internvit.config import InternViTConfig
from internvit.model.vit import InternViT
from internvit.numerics import layer_norm_terms, norm_failures, product_failures, relative_error, sample
from internvit.ops.core.select import BACKENDS, implements


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


def _norm(kind: str, seam: bool, x: Tensor, generator: torch.Generator, backend: str) -> Outcome:
    width, device = x.shape[-1], x.device

    def vector(offset: float) -> Tensor:
        return offset + 0.3 * sample((width,), "normal", x.dtype, generator).to(device)

    weight, bias = vector(1), vector(0) if kind == "layer_norm" else None
    if seam:
        branch, gamma = sample(tuple(x.shape), "normal", x.dtype, generator).to(device), vector(0.5)
        x, y = ops.layer_scale_residual_norm(x, branch, gamma, None, weight, bias, kind=kind, backend=backend)
    elif kind == "rms_norm":
        y = ops.rms_norm(x, weight, backend=backend)
    else:
        y = ops.layer_norm(x, weight, bias, backend=backend)

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if kind == "rms_norm":
            return F.rms_norm(x, (width,), weight, 1e-6)
        return F.layer_norm(x, (width,), weight, bias, 1e-6)

    wide = x.double()
    truth = plain(wide, weight.double(), None if bias is None else bias.double())
    if bias is None:
        return norm_failures(y, truth, plain(x, weight, bias)), relative_error(y, truth)
    condition = (wide.mean(-1).abs() / wide.std(-1)).max().item()
    failures = norm_failures(y, truth, plain(x, weight, bias), layer_norm_terms(x, weight, bias), condition)
    return failures, relative_error(y, truth)


def _attention(qkv: Tensor, generator: torch.Generator, backend: str, qk_norm: bool) -> Outcome:
    width = qkv.shape[3] * qkv.shape[4]
    weights = None
    if qk_norm:
        weights = [1 + 0.3 * sample((width,), "normal", qkv.dtype, generator).to(qkv.device) for _ in range(2)]
    q_weight, k_weight = weights or (None, None)
    out = ops.qk_norm_attention(qkv, None, None, q_weight, k_weight, backend=backend)

    def plain(dtype: torch.dtype) -> Tensor:
        q, k, v = qkv.to(dtype).unbind(2)
        if weights is not None:
            q, k = (
                F.rms_norm(x.flatten(2), (width,), w.to(dtype), 1e-6).view(x.shape)
                for x, w in zip((q, k), weights, strict=True)
            )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)

    truth = plain(torch.float64)
    return product_failures(out, truth, plain(qkv.dtype), 2.0 if qkv.dtype == torch.float32 else 1.02), relative_error(
        out, truth
    )


def _linear_gelu(x: Tensor, generator: torch.Generator, backend: str) -> Outcome:
    weight = sample((2 * x.shape[-1], x.shape[-1]), "normal", x.dtype, generator).to(x.device) / x.shape[-1] ** 0.5
    bias = sample((2 * x.shape[-1],), "normal", x.dtype, generator).to(x.device)
    truth = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    y = ops.linear_gelu(x, weight, bias, backend)
    return product_failures(y, truth, F.gelu(F.linear(x, weight, bias))), relative_error(y, truth)


def _linear_layer_scale(x: Tensor, generator: torch.Generator, backend: str) -> Outcome:
    width = x.shape[-1]
    weight = sample((width // 4, width), "normal", x.dtype, generator).to(x.device) / width**0.5
    bias, gamma = (sample((width // 4,), "normal", x.dtype, generator).to(x.device) for _ in range(2))
    truth = F.linear(x.double(), weight.double(), bias.double()) * gamma.double()
    y = ops.linear_layer_scale(x, weight, bias, gamma, backend)
    emulation = F.linear(x, weight, bias) * gamma
    if x.dtype != torch.float32:  # the folded weight is the operand that is rounded
        emulation = F.linear(x.double(), (weight * gamma[:, None]).double(), (bias * gamma).double()).to(x.dtype)
    return product_failures(y, truth, emulation), relative_error(y, truth)


def _gradients(backend: str, kind: str, device: str, generator: torch.Generator) -> Outcome:
    """A whole block's gradients on one backend in float32, against the reference's in float64."""
    config = _block_config(kind)
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


def _block_config(kind: str) -> InternViTConfig:
    qk_norm = kind == "rms_norm"
    sizes = {"image_size": 42, "hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 256}
    return InternViTConfig(
        **sizes,  # type: ignore[arg-type]
        num_hidden_layers=2,
        norm_type=kind,
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
    return product_failures(out, truth, eager, 2.0 if dtype == torch.float32 else 1.02), relative_error(out, truth)


def _backends(op: str, device: str, dtype: torch.dtype) -> list[str]:
    names = []
    for name, candidate in BACKENDS.items():
        usable = candidate.missing() is None and candidate.rejects(device, dtype, 64) is None
        if usable and implements(op, name):
            names.append(name)
    return names


def checks(
    quick: bool = False, device: str = "cpu", seed: int | None = None
) -> Iterator[tuple[str, str, str, str, Callable[[], Outcome]]]:
    """What there is to check on this machine: (what, backend, dtype, shape, run); without `seed` on fresh data."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    dtypes = (torch.float32, torch.bfloat16) if quick else (torch.float32, torch.bfloat16, torch.float16)
    distributions = (
        ("normal", "massive") if quick else ("normal", "massive", "near_zero", "large_mean", "near_overflow")
    )
    widths = (1024, 3200) if quick else (40, 384, 1024, 3200)
    tokens = 257 if quick else 1025

    def name(dtype: torch.dtype) -> str:
        return str(dtype).removeprefix("torch.")

    for dtype in dtypes:
        for seam in (False, True):
            for kind in ("rms_norm", "layer_norm"):
                op = "layer_scale_residual_norm" if seam else kind
                for backend in _backends(op, device, dtype):
                    for width in widths:
                        for distribution in distributions:

                            def run_norm(k=kind, s=seam, w=width, d=distribution, t=dtype, b=backend) -> Outcome:  # type: ignore[no-untyped-def]
                                return _norm(k, s, sample((1, tokens, w), d, t, generator, device), generator, b)

                            what = f"{op} ({kind})" if seam else op
                            yield f"{what}, {distribution}", backend, name(dtype), f"{tokens}x{width}", run_norm
        for heads, head_dim in ((16, 64), (25, 128)):
            for backend in _backends("attention", device, dtype):
                for qk_norm in (False, True):

                    def run_attention(h=heads, w=head_dim, t=dtype, b=backend, n=qk_norm) -> Outcome:  # type: ignore[no-untyped-def]
                        qkv = sample((1, tokens, 3, h, w), "normal", t, generator, device)
                        return _attention(qkv, generator, b, n)

                    what = "qk_norm_attention" if qk_norm else "attention"
                    yield what, backend, name(dtype), f"{tokens}x{heads}x{head_dim}", run_attention
        for backend in _backends("linear_gelu", device, dtype):

            def run_gelu(t=dtype, b=backend) -> Outcome:  # type: ignore[no-untyped-def]
                return _linear_gelu(sample((1, tokens, 1024), "normal", t, generator, device), generator, b)

            yield "linear_gelu", backend, name(dtype), f"{tokens}x1024", run_gelu
        for backend in _backends("linear_layer_scale", device, dtype):
            if dtype == torch.float16:  # refused there
                continue

            def run_folded(t=dtype, b=backend) -> Outcome:  # type: ignore[no-untyped-def]
                return _linear_layer_scale(sample((1, tokens, 4096), "normal", t, generator, device), generator, b)

            yield "linear_layer_scale", backend, name(dtype), f"{tokens}x4096", run_folded
    for backend in _backends("rms_norm", device, torch.float32):
        for kind in ("rms_norm", "layer_norm"):

            def run_gradients(b=backend, k=kind) -> Outcome:  # type: ignore[no-untyped-def]
                return _gradients(b, k, device, generator)

            yield f"gradients of a model ({kind})", backend, "float32", "2x10x128", run_gradients
    for variant in ("internvit-300m-448px",) if quick else ("internvit-300m-448px", "internvit-6b-448px-v2.5"):
        for dtype in (torch.float32, torch.bfloat16):

            def run_model(v=variant, t=dtype) -> Outcome:  # type: ignore[no-untyped-def]
                return _model("auto", v, t, device, generator)

            yield f"{variant}, 2 layers", "auto", name(dtype), "448x448", run_model


def run(quick: bool = False, device: str = "cpu", seed: int | None = None) -> Iterator[Result]:
    """Runs every check; an exception is a failure of that check alone."""
    for what, backend, dtype, shape, call in checks(quick, device, seed):
        try:
            failures, error = call()
        except Exception as problem:
            failures, error = [f"{type(problem).__name__}: {problem}"], float("nan")
        yield Result(what, backend, dtype, shape, tuple(failures), error)
