"""The bodies that nvcc compiles, run on the host through their own bindings: the op tests, and what is theirs alone."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from internvit import ops
from internvit.numerics import relative_error, sample
from tests.proofs.cuda import host
from tests.proofs.native.test_bad_arguments import attack

KINDS = ("rms_norm", "layer_norm")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def run_op_tests(host_library, pytestconfig) -> Callable[..., None]:
    """Runs op tests with the host's ops as backend `cuda`, on this run's random data and of the kinds it runs."""

    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", "tests.proofs.cuda.host", str(host_library), "-q", *arguments]
        command += ["--seed", str(pytestconfig.option.seed), "-m", pytestconfig.option.markexpr]
        done = subprocess.run(command, cwd=host.ROOT, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        assert " passed" in done.stdout
        assert "skipped" not in done.stdout

    return run


FEW_ROWS = "cuda and not 257x and not 1025x and not true_width"
CONTRACTS = tuple(
    f"tests/ops/test_{name}.py" for name in ("rms_norm", "layer_norm", "layer_scale_residual", "qk_norm", "linear_gelu")
)
OP_TESTS = {
    "the contract on few rows": (*CONTRACTS, "-k", FEW_ROWS),
    "every op": ("tests/ops/test_every_op.py", "-k", "cuda and not attention"),
    "quantised rows": ("tests/ops/test_quant.py", "-k", "cuda and not threads"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("which", OP_TESTS)
def test_op_tests_on_the_host(run_op_tests, which) -> None:
    run_op_tests(*OP_TESTS[which])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_op_test(run_op_tests) -> None:
    run_op_tests("tests/ops", "-k", "cuda")


def fused_add_norm(kind: str, x: dict) -> tuple:
    return ops.layer_scale_residual_norm(**x, norm_type=kind, backend="cuda")


def fused_arguments(shape: tuple, kind: str, dtype: torch.dtype, generator, residual_dtype=None) -> dict:
    def vector():
        return sample(shape[-1:], "normal", dtype, generator)

    return dict(
        residual=sample(shape, "massive", residual_dtype or dtype, generator),
        branch=sample(shape, "normal", dtype, generator),
        gamma=vector(),
        row_scale=torch.tensor([1.25, 0.0]),
        weight=vector(),
        bias=vector() if kind == "layer_norm" else None,
    )


def with_gradients(function, x: dict, grads: list) -> list:
    leaves = {n: t if t is None or n == "row_scale" else t.detach().requires_grad_() for n, t in x.items()}
    outs = function(leaves)
    wanted = [t for t in leaves.values() if t is not None and t.requires_grad]
    return [
        *(o.detach() for o in outs),
        *torch.autograd.grad(outs, wanted, [g.to(o) for g, o in zip(grads, outs, strict=True)]),
    ]


def fused_truth(kind: str, x: dict, grads: list) -> tuple[list, list]:
    """The results of `with_gradients` in float64, and the size of each: the largest element, or of the sums over rows
    the root of their terms' squares, which is what the terms' own roundings add up to where a sum cancels."""
    images = x["row_scale"].double().view(-1, 1, 1)
    shape, given = x["residual"].shape, {n: t.double() for n, t in x.items() if t is not None and n != "row_scale"}
    leaves = {n: t.expand(shape).clone().requires_grad_() for n, t in given.items()}
    out = leaves["residual"] + images * leaves["gamma"] * leaves["branch"]
    centred = out - out.mean(-1, keepdim=True) if kind == "layer_norm" else out
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-6) * leaves["weight"]
    normed = normed + leaves["bias"] if kind == "layer_norm" else normed
    terms = torch.autograd.grad((out, normed), list(leaves.values()), [g.double() for g in grads])
    truth, sizes = [out.detach(), normed.detach()], [out.abs().max().item(), normed.abs().max().item()]
    for t, is_sum in zip(terms, [t.dim() == 1 for t in given.values()], strict=True):
        truth.append(t.sum((0, 1)) if is_sum else t)
        sizes.append((t.square().sum((0, 1)).sqrt() if is_sum else t.abs()).max().item())
    return truth, sizes


@pytest.mark.parametrize("channels", [1, 7, 33, 40, 136, 500, 1025, 1152, 2056, 8192])
@pytest.mark.parametrize("kind", KINDS)
def test_every_width(on_host, kind, channels, generator) -> None:
    """Each layout of the launch rule, rows that do not fill a block, and a backward that walks over several tiles."""
    for dtype, residual_dtype in ((torch.bfloat16, None), (torch.float16, torch.float32), (torch.float32, None)):
        shape = (2, 13 if channels < 1100 else 3, channels)
        x = fused_arguments(shape, kind, dtype, generator, residual_dtype)
        grads = [sample(shape, "normal", dtype, generator) for _ in range(2)]
        actual = with_gradients(lambda x: fused_add_norm(kind, x), x, grads)
        eps = torch.finfo(dtype).eps
        for a, t, size in zip(actual, *fused_truth(kind, x, grads), strict=True):
            # Of one channel LayerNorm is 0 but for rounding.
            assert ((a.double() - t).abs().max().item() < 4 * eps * size) or channels == 1


PAIRS = [(t, r) for t in DTYPES for r in dict.fromkeys((t, torch.float32))]


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("dtype", "residual_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("channels", [40, 384, 1024, 1028, 3200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_op_has_the_bits_of_the_two_ops(on_host, kind, channels, dtype, residual_dtype, generator) -> None:
    """Forward, statistics included; backward too where the stream is float32 and the two ops round nothing between."""
    raw, is_layer_norm = torch.ops.internvit_cuda_host, kind == "layer_norm"
    x = fused_arguments((2, 13 if channels > 1000 else 60, channels), kind, dtype, generator, residual_dtype)
    residual, branch, gamma, row_scale, weight, bias = x.values()
    out, normed, mean, rstd = raw.layer_scale_residual_norm(*x.values(), 1e-6, kind, "fused")
    apart = raw.layer_scale_residual(residual, branch, gamma, row_scale)
    assert torch.equal(out, apart)
    if is_layer_norm:
        y, *statistics = raw.layer_norm(apart, weight, bias, 1e-6)
        assert torch.equal(mean, statistics[0])
    else:
        y, *statistics = raw.rms_norm(apart, weight, 1e-6, "fused")
    assert torch.equal(rstd, statistics[-1])
    assert torch.equal(normed, y.to(dtype))
    if residual_dtype != torch.float32:
        return
    grad_out, grad_normed = (sample(out.shape, "normal", t, generator) for t in (residual_dtype, dtype))
    fused = raw.layer_scale_residual_norm_backward(
        grad_out, grad_normed, out, branch, gamma, row_scale, weight, mean, rstd, kind, [True] * 4 + [is_layer_norm]
    )
    backward = raw.layer_norm_backward if is_layer_norm else raw.rms_norm_backward
    mask = [True] * (3 if is_layer_norm else 2)
    grad_x, *of_norm = backward(grad_normed.float(), out, weight.float(), *statistics, mask)
    grad_residual = grad_x + grad_out
    of_residual = raw.layer_scale_residual_backward(grad_residual, branch, gamma, row_scale, dtype, [True, True])
    of_norm = [g.to(dtype) for g in of_norm]
    for a, b in zip(fused, [grad_residual, *of_residual, *of_norm], strict=False):
        assert torch.equal(a, b)


@dtypes
@pytest.mark.parametrize("channels", [40, 1024, 3200])
def test_misaligned_tensors_have_the_same_bits(on_host, dtype, channels, generator) -> None:
    """A slice that starts off 16 bytes takes the scalar path, in the same layout and order."""
    x, residual, grad = (sample((5, channels), "normal", dtype, generator) for _ in range(3))
    weight, gamma = (sample((channels,), "normal", dtype, generator) for _ in range(2))

    def shifted(t):
        room = torch.empty(*t.shape[:-1], t.shape[-1] + 3, dtype=t.dtype)
        room[..., 1:-2] = t
        return room[..., 1:-2]

    def run(x, residual, weight, gamma, grad):
        inputs = {
            "residual": residual,
            "branch": x,
            "gamma": gamma,
            "row_scale": None,
            "weight": weight,
            "bias": weight,
        }
        norm = with_gradients(lambda i: (ops.rms_norm(i["x"], i["w"], backend="cuda"),), {"x": x, "w": weight}, [grad])
        return [*norm, *with_gradients(lambda i: fused_add_norm("layer_norm", i), inputs, [grad, grad])]

    aligned = run(x, residual, weight, gamma, grad)
    moved = run(*map(shifted, (x, residual, weight, gamma, grad)))
    for a, b in zip(aligned, moved, strict=True):
        assert torch.equal(a, b)


def test_gelu_of_any_size_and_alignment(on_host, generator) -> None:
    """Element by element: of few elements each may be one of the far tail, or beside the zero of the slope."""
    raw, float32 = torch.ops.internvit_cuda_host, torch.finfo(torch.float32)
    for dtype in DTYPES:
        finfo = torch.finfo(dtype)
        for size in (1, 7, 8, 4099):
            z, grad = (3 * sample((size + 1,), "normal", dtype, generator) for _ in range(2))
            for start in (0, 1):
                part, g = z[start : start + size], grad[start : start + size]
                wide, slope = part.double(), g.double()
                cdf = torch.special.erfc(-wide * 0.5**0.5) / 2  # F.gelu's (1 + erf) / 2 has no digits below -8
                density = (-wide.square() / 2).exp() / (2 * torch.pi) ** 0.5
                # The rounding of exp2's argument counts z^2 times, those of the rest 4 times at most; beside it the
                # error of the fit (csrc/common/gelu_fit.h). Below the smallest normal number a rounding is no smaller.
                fit = {torch.bfloat16: 1e-5, torch.float16: 2e-6, torch.float32: 1e-8}[dtype]
                arithmetic = float32.eps * (wide.square() + 4) + fit
                sizes = cdf.clamp_min(float32.tiny), wide.abs() * density.clamp_min(float32.tiny)
                for actual, truth, terms in (
                    (raw.gelu(part), wide * cdf, wide.abs() * sizes[0]),
                    (raw.gelu_backward(g, part), slope * (cdf + wide * density), slope.abs() * sum(sizes)),
                ):
                    rounding = finfo.eps * truth.abs().clamp_min(finfo.tiny) / 2
                    assert ((actual.double() - truth).abs() <= arithmetic * terms + rounding).all()


def test_gelu_of_what_is_no_ordinary_number(on_host) -> None:
    """As PyTorch's: NaN stays NaN, infinity stays infinite, and the tail keeps its digits."""
    raw = torch.ops.internvit_cuda_host
    for dtype in DTYPES:
        z = torch.tensor([float("nan"), float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)
        torch.testing.assert_close(raw.gelu(z), torch.nn.functional.gelu(z.double()).to(dtype), equal_nan=True)
        slope = raw.gelu_backward(torch.ones_like(z), z)
        assert slope[0].isnan()
        assert slope[2:].tolist() == [1.0, 0.0]
    tail = torch.arange(-13.0, -8.0, 0.125)
    wide = tail.double()
    truth = wide * torch.special.erfc(-wide * 0.5**0.5) / 2
    for dtype in (torch.bfloat16, torch.float32):
        error = (raw.gelu(tail.to(dtype)).double() - truth).abs() / truth.abs()
        assert error.max() < torch.finfo(dtype).eps / 2 + 3e-5


def test_parameters_in_another_dtype(on_host, generator) -> None:
    x = sample((3, 40), "normal", torch.bfloat16, generator)
    for dtype in (torch.float32, torch.float16, torch.float64):
        weight = sample((40,), "normal", dtype, generator).requires_grad_()
        y = ops.rms_norm(x, weight, backend="cuda")
        expected = ops.rms_norm(x, weight, backend="reference")
        assert relative_error(y, expected.double()) < 2e-3
        (grad,) = torch.autograd.grad(y.float().sum(), weight)
        assert grad.dtype == dtype


@pytest.mark.sampled(3)  # 8 s
def test_bad_arguments_are_errors_that_name_them(host_library, seed) -> None:
    attack("internvit_cuda_host", host_library, seed)


def test_a_row_wider_than_a_block_holds(on_host) -> None:
    x, weight = torch.ones(1, 8200), torch.ones(8200)
    with pytest.raises(RuntimeError, match="x must have 1 to 8192 channels on backend 'cuda', got 8200"):
        torch.ops.internvit_cuda_host.rms_norm(x, weight, 1e-6, "fused")
