"""Every op of the CPU library on every instruction set this machine has, against float64.

The unit in use is the machine's best; here each one takes its turn, so that a machine with AMX proves the code that
another machine will run.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from internvit.numerics import norm_violations, product_violations, relative_error, sample
from internvit.ops.backends import native
from internvit.ops.core.norm_math import statistics
from internvit.ops.core.registration import OPS
from internvit.ops.core.spec import INFERENCE_SPECS, SPECS, Inputs, OpSpec, Size, as_tuple
from tests.ops.shapes import in_draws, pooled
from tests.support.implementations import call, op_calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
cpu = torch.ops.internvit_cpu

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_an_unknown_unit_is_a_clear_error() -> None:
    if reason := native.unavailable_reason("internvit_cpu"):
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="this machine has generic"):
        cpu.use_instruction_set("mmx")


@each_dtype
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (3, 40), (5, 3200)])
@pytest.mark.parametrize("distribution", ["normal", "massive", "near_overflow"])
def test_norms(unit: str, dtype: torch.dtype, rows: int, width: int, distribution: str, generator) -> None:
    x = sample((pooled(rows), width), distribution, dtype, generator)
    weight, bias = (sample((width,), "normal", dtype, generator) for _ in range(2))
    results = [cpu.rms_norm(part, weight, 1e-6, "fused") for part in in_draws(x, rows)]
    y, rstd = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    truth = F.rms_norm(x.double(), (width,), weight.double(), 1e-6)
    assert norm_violations(y, truth, F.rms_norm(x, (width,), weight, 1e-6)) == []
    assert relative_error(rstd, torch.rsqrt(x.double().square().mean(-1) + 1e-6)) < 1e-6
    results = [cpu.layer_norm(part, weight, bias, 1e-6) for part in in_draws(x, rows)]
    y, mean, _ = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    truth = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-6)
    assert relative_error(y, truth) < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)
    assert relative_error(mean, x.double().mean(-1)) < 1e-4


ROW_SPECS = [spec for spec in SPECS.values() if "cpu" in OPS[spec.op].compiled and not spec.multiplies_matrices]
QUANTIZING_SPECS = [spec for spec in INFERENCE_SPECS.values() if "cpu" in OPS[spec.op].compiled]


def widened(a: Any) -> Any:
    if isinstance(a, torch.Tensor):
        return a.double()
    return torch.float64 if isinstance(a, torch.dtype) else a


@each_dtype
@pytest.mark.parametrize("spec", ROW_SPECS, ids=lambda spec: spec.name)
def test_row_ops_forward_and_backward(unit: str, dtype: torch.dtype, spec: OpSpec, generator) -> None:
    """Each raw op against its reference in float64; gradients that an op adds to are views of one packed buffer."""
    for example in spec.examples.values():
        for one in op_calls(spec, example(Inputs(Size(2, 7, 3, 24), generator, dtype))):
            packed = sample((2, 7, 3, 3, 24), "normal", dtype, generator)
            wide, third = packed.double(), packed[:, :, 2].clone()
            count = len(one.raw_args) - len(one.args)
            outputs = getattr(cpu, one.op.name)(*one.args, *packed.unbind(2)[:count])
            truth = call(one.op.name, "reference", *map(widened, one.args), *wide.unbind(2)[:count])
            actual = (*(as_tuple(outputs) if outputs is not None else ()), packed)
            expected = [*(as_tuple(truth) if truth is not None else ()), wide]
            if one.op.name == "layer_scale_residual_norm":  # its statistics are of the residual as it is stored
                expected[2:4] = statistics(actual[0].double(), one.args[7], one.args[6])
            for a, t in zip(actual, expected, strict=True):
                if a.numel() and t.numel():
                    limit = 2e-6 if a.dtype == torch.float32 else torch.finfo(dtype).eps / 2
                    assert relative_error(a, t) < limit, one.op.name
            assert torch.equal(packed[:, :, 2], third)


@each_dtype
@pytest.mark.parametrize("spec", QUANTIZING_SPECS, ids=lambda spec: spec.name)
def test_quantising_row_ops(unit: str, dtype: torch.dtype, spec: OpSpec, generator) -> None:
    for example in spec.examples.values():
        for size in (Size(2, 7, 3, 24), Size(1, 2, 1, 19)):
            arguments = example(Inputs(size, generator, dtype, distribution="massive"))
            outputs = spec.run(arguments, "cpu")
            assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs)
            if spec.name == "per_token_quant":  # no arithmetic before: the same bits
                pairs = zip(outputs, spec.run(arguments, "reference"), strict=True)
                assert all(torch.equal(a.view(torch.int8), e.view(torch.int8)) for a, e in pairs)


@each_dtype
@pytest.mark.parametrize("size", [2, 17, 1024, 5000])
def test_gelu(unit: str, dtype: torch.dtype, size: int, generator) -> None:
    z = torch.linspace(-20, 20, size, dtype=torch.float64).to(dtype)
    grad = sample((size,), "normal", dtype, generator)
    wide = z.double().requires_grad_()
    truth = wide.clamp_min(0) - wide.abs() * torch.special.erfc(wide.abs() / 2**0.5) / 2
    (slope,) = torch.autograd.grad(F.gelu(wide), wide, grad.double())
    tolerance = 3e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    assert relative_error(cpu.gelu(z), truth) < tolerance
    assert relative_error(cpu.gelu_backward(grad, z), slope) < tolerance
    # The negative tail keeps its relative accuracy, where z (1 + erf) / 2 has none even in float64.
    tail = (z > -9) & (z < -1) & (truth.abs() > 10 * torch.finfo(dtype).tiny)
    if tail.any():
        assert ((cpu.gelu(z)[tail].double() / truth[tail] - 1).abs() < max(20 * tolerance, 2e-5)).all()


def test_gelu_of_special_values(unit: str) -> None:
    z = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e30, -1e30])
    assert torch.equal(cpu.gelu(z).nan_to_num(7.0), torch.tensor([z[0], 0.0, 7.0, 0.0, 0.0, 1e30, 0.0]).nan_to_num(7.0))
    slopes = cpu.gelu_backward(torch.ones_like(z), z)
    assert slopes[2].isnan()
    assert torch.equal(slopes[[0, 1, 3, 4, 5, 6]], torch.tensor([1.0, 0.0, 0.5, 0.5, 1.0, 0.0]))


def emulated(q, k, v, scale: float, weights) -> torch.Tensor:
    """float64, with q (as the unit feeds it to its tiles), the probabilities and the output rounded to bfloat16."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    if weights[0] is not None:
        q_weight, k_weight, rstd_q, rstd_k = (w.double() for w in weights)
        factor = (q_weight * k_weight).view(q.shape[1], 1, -1) * rstd_q[:, None, :, None] * scale
        scores = (q * factor).bfloat16().double() @ k.transpose(-1, -2) * rstd_k[:, None, None, :]
    else:
        scores = q @ k.transpose(-1, -2) * scale
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    return ((p.bfloat16().double() @ v) / p.sum(-1, keepdim=True)).transpose(1, 2).bfloat16()


def attention_case(tokens: int, heads: int, head_dim: int, folded: bool, dtype: torch.dtype, generator, spread=1.0):
    """q, k, v and the weights, of two images, and of more where tokens are few.

    Row dots cancel: of 66 tokens one draw in 300 is past the bound in float32, eager PyTorch's as well.
    """
    batch = max(2, 1024 // tokens if tokens < 64 else 0)
    q, k, v = sample((batch, tokens, 3, heads, head_dim), "normal", dtype, generator).unbind(2)
    q, k = (q.double() * spread).to(dtype), (k.double() * spread).to(dtype)
    weights = (None,) * 4
    if folded:
        width = heads * head_dim
        norm = [1 + 0.3 * sample((width,), "normal", torch.float32, generator) for _ in range(2)]
        weights = (*norm, *(statistics(x.flatten(2), "rms_norm", 1e-6)[1].float() for x in (q, k)))
    return q, k, v, weights


ATTENTION_SHAPES = [(1, 1, 8), (3, 2, 40), (33, 3, 128), (130, 1, 88), (257, 2, 64), (449, 1, 16)]


@each_dtype
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), ATTENTION_SHAPES)
def test_attention(unit: str, dtype, folded: bool, tokens: int, heads: int, head_dim: int, generator) -> None:
    q, k, v, weights = attention_case(tokens, heads, head_dim, folded, dtype, generator)
    scale = head_dim**-0.5
    out, lse = cpu.attention(q, k, v, scale, *weights)
    wide = [t.double() for t in (q, k, v)], [None if w is None else w.double() for w in weights]
    truth, true_lse = call("attention", "reference", *wide[0], scale, *wide[1])
    if dtype == torch.bfloat16:
        # Few elements scatter more than 10 % about the emulation's error.
        factor = 1.1 if out.numel() > 20000 else 1.5
        assert product_violations(out, truth, emulated(q, k, v, scale, weights), factor) == []
    else:
        eager = call("attention", "reference", q.float(), k.float(), v.float(), scale, *weights)[0].to(dtype)
        assert product_violations(out, truth, eager, 2.0) == []
    assert (lse - true_lse).abs().max() < (0.03 if folded and dtype == torch.bfloat16 else 2e-4)


@each_dtype
def test_a_lone_keys_value_comes_back_to_the_bit(unit: str, dtype: torch.dtype, generator) -> None:
    q, k, v, _ = attention_case(1, 3, 64, False, dtype, generator)
    assert torch.equal(cpu.attention(q, k, v, 0.125, *(None,) * 4)[0], v)


@pytest.mark.parametrize("spread", [8.0, 40.0, 1e9, 1e17])
def test_attention_with_scores_far_from_their_bound(unit: str, spread: float, generator) -> None:
    """Large logits, up to a softmax of one key: the bound on the scores is loose, and exact maxima take over."""
    q, k, v, weights = attention_case(130, 2, 64, False, torch.bfloat16, generator, spread)
    q[:, 3] = 0
    out, lse = cpu.attention(q, k, v, 0.125, *weights)
    truth, true_lse = call("attention", "reference", q.double(), k.double(), v.double(), 0.125, *weights)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert relative_error(lse, true_lse) < 1e-6
    # Which of two keys takes all is float32's choice where their scores are as close as the rounding of their sums: one
    # draw in 1500 has such a query.
    wide_q, wide_k = q.double(), k.double()
    first, second = torch.einsum("bihd,bjhd->bihj", wide_q, wide_k).topk(2).values.unbind(-1)
    terms = torch.einsum("bihd,bjhd->bihj", wide_q.abs(), wide_k.abs()).amax(-1)
    decided = (first - second > torch.finfo(torch.float32).eps * terms) | (wide_q == 0).all(-1)
    assert decided.double().mean() > 0.99
    assert relative_error(out[decided], truth[decided]) < 0.01


@each_dtype
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim"), [(1, 1, 8), (3, 2, 40), (70, 2, 64), (33, 1, 128), (257, 1, 88)]
)
def test_attention_backward(unit: str, dtype, folded: bool, tokens: int, heads: int, head_dim: int, generator) -> None:
    q, k, v, weights = attention_case(tokens, heads, head_dim, folded, dtype, generator)
    wide = [t.double() for t in (q, k, v)], [None if w is None else w.double() for w in weights]
    out, lse = call("attention", "reference", *wide[0], 0.2, *wide[1])
    out, lse = (
        out.to(dtype),
        lse.float(),
    )  # as the kernel gets them: in float32 lse's own rounding moves row dots by 6e-6
    grad_out = sample(tuple(q.shape), "normal", dtype, generator)
    packed = torch.full((len(q), tokens, 3, heads, head_dim), float("nan"), dtype=dtype)
    truth = torch.empty(packed.shape, dtype=torch.float64)
    results = cpu.attention_backward(grad_out, q, k, v, out, lse, 0.2, *weights, *packed.unbind(2))
    expected = call(
        "attention_backward",
        "reference",
        grad_out.double(),
        *wide[0],
        out.double(),
        lse.double(),
        0.2,
        *wide[1],
        *truth.unbind(2),
    )
    tolerance = 3e-6 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps
    assert relative_error(packed, truth) < tolerance
    for a, t in zip(results, expected, strict=True):
        # Over one token the softmax is flat: the gradients of QK-norm are 0 but for rounding.
        assert tokens == 1 or relative_error(a, t) < 2 * tolerance


@each_dtype
@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_attention_backward_of_large_scores_that_differ_little(unit: str, dtype, offset: float, generator) -> None:
    """A soft softmax far from 0: exp(S - lse) has no digits left of it. All products are exact in float32."""
    q, k, v = (torch.randint(-8, 9, (2, 70, 2, 40), generator=generator).to(dtype) / 8 for _ in range(3))
    root = 2.0 ** round(math.log2(offset / 0.125) / 2)
    q[..., -1] = k[..., -1] = root
    grad_out = sample(tuple(q.shape), "normal", dtype, generator)
    check_attention_backward(q, k, v, grad_out, 0.125, dtype)


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(dtype, size) for dtype in DTYPES for size in (1e4, 1e7, 1e9) if dtype != torch.float16 or size < 1e9],
    ids=str,
)
@pytest.mark.parametrize("scale", [0.125, -0.125])
def test_attention_backward_of_large_scores(unit: str, dtype, size: float, scale: float, generator) -> None:
    """A softmax of one key each, where its gradient is what is left of a difference of huge numbers."""
    q, k, v = sample((2, 70, 3, 2, 64), "normal", dtype, generator).unbind(2)
    q, k = ((t.double() * size**0.5).to(dtype) for t in (q, k))
    grad_out = sample(tuple(q.shape), "normal", dtype, generator)
    # Which of two keys takes all is float32's choice where their scores are as close as the rounding of their sums.
    scores = torch.einsum("bihd,bjhd->bihj", q.double(), k.double()) * scale
    terms = torch.einsum("bihd,bjhd->bihj", q.double().abs(), k.double().abs()).amax(-1) * abs(scale)
    first, second = scores.topk(2).values.unbind(-1)
    grad_out[first - second < 64 + 1e-6 * terms] = 0
    assert (grad_out != 0).double().mean() > 0.5
    check_attention_backward(q, k, v, grad_out, scale, dtype)


def check_attention_backward(q, k, v, grad_out, scale: float, dtype: torch.dtype) -> None:
    wide = [t.double() for t in (q, k, v)]
    true_out, true_lse = call("attention", "reference", *wide, scale, *(None,) * 4)
    truth = [torch.empty(q.shape, dtype=torch.float64) for _ in range(3)]
    call("attention_backward", "reference", grad_out.double(), *wide, true_out, true_lse, scale, *(None,) * 4, *truth)
    out, lse = cpu.attention(q, k, v, scale, *(None,) * 4)
    grads = [torch.full_like(t, float("nan")) for t in (q, k, v)]
    cpu.attention_backward(grad_out, q, k, v, out, lse, scale, *(None,) * 4, *grads)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for name, actual, right in zip("qkv", grads, truth, strict=True):
        assert actual.isfinite().all(), name
        # Where the softmax takes one key, the gradients of q and k are 0: errors are measured by their terms.
        terms = {"q": k, "k": q, "v": right}[name].double().abs().max()
        size = max(right.abs().max(), terms)
        assert (actual.double() - right).abs().max() < tolerance * size, name


def run_everything(generator: torch.Generator, batch: int) -> list[torch.Tensor]:
    """All forward ops on `batch` images of which the first is always the same."""
    one = sample((8, 70, 3, 2, 40), "normal", torch.bfloat16, generator)[:batch]
    tokens = one.flatten(2)
    weight = sample((240,), "normal", torch.bfloat16, generator)
    norm_weight = sample((80,), "normal", torch.bfloat16, generator)
    q, k, v = one.unbind(2)
    _, _, *rstd = normed = cpu.qk_norm(q, k, norm_weight, norm_weight, 1e-6, "reference")
    outputs = [
        *cpu.layer_norm(tokens, weight, weight, 1e-6),
        *cpu.layer_scale_residual_norm(tokens, tokens, weight, None, weight, None, 1e-6, "rms_norm", "fused"),
        *normed,
        *cpu.attention(q, k, v, 0.2, norm_weight, norm_weight, *rstd),
        *cpu.attention(q.float(), k.float(), v.float(), 0.2, None, None, None, None),
        cpu.gelu(tokens),
    ]
    matrix = sample((96, 240), "normal", torch.bfloat16, generator)
    for dtype in (torch.bfloat16, torch.float32):
        if cpu.packs_linear(dtype):
            packed = cpu.pack_weight(matrix.to(dtype))
            outputs.append(cpu.linear_packed(tokens.to(dtype), packed, 96, None, None, True))
    if cpu.multiplies_int8():
        packed = cpu.pack_weight_int8(torch.arange(96 * 240).view(96, 240).remainder(255).sub(127).char())
        outputs.append(cpu.linear_int8_dynamic(tokens, packed, torch.full((96,), 0.01), None, True))
    return [o for o in outputs if o.dim() and o.shape[0] == batch]


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_an_image_has_the_same_bits_alone_and_in_a_batch(unit: str, batch: int) -> None:
    alone = run_everything(torch.Generator().manual_seed(7), 1)
    together = run_everything(torch.Generator().manual_seed(7), batch)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a[0], b[0])


def test_the_same_bits_for_any_number_of_threads(unit: str, generator) -> None:
    """Of every op: the other tests run on one thread where they share the cores."""
    x, grad, branch = (sample((300, 257), "normal", torch.bfloat16, generator) for _ in range(3))
    weight = sample((257,), "normal", torch.float32, generator)
    q, k, v, weights = attention_case(70, 2, 40, True, torch.bfloat16, generator)
    results = []
    before = torch.get_num_threads()
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        mean, rstd = x.float().mean(-1), torch.rsqrt(x.float().var(-1) + 1e-6)
        fused = cpu.layer_scale_residual_norm_backward(
            grad, grad, x, branch, weight, None, weight, mean, rstd, "layer_norm", [True] * 5
        )
        out, lse = cpu.attention(q, k, v, 0.2, *weights)
        packed = torch.empty(2, 70, 3, 2, 40, dtype=torch.bfloat16)
        sums = cpu.attention_backward(out, q, k, v, out, lse, 0.2, *weights, *packed.unbind(2))
        gelu = cpu.gelu_backward(grad, x)
        results.append([*fused, out, lse, packed, *sums, gelu, *run_everything(torch.Generator().manual_seed(7), 8)])
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_callers_on_several_threads_get_the_bits_of_one(unit: str, generator) -> None:
    """Working memory belongs to a thread: calls side by side, as from a server's workers, do not meet in it."""
    cases = [attention_case(tokens, 2, 64, True, torch.bfloat16, generator) for tokens in (33, 130, 257, 300)]
    x, w = (sample((n, 96), "normal", torch.bfloat16, generator) for n in (65, 64))
    packed = cpu.pack_weight(w) if cpu.packs_linear(torch.bfloat16) else None

    def work(index: int) -> list[torch.Tensor]:
        q, k, v, weights = cases[index]
        out, lse = cpu.attention(q, k, v, 0.125, *weights)
        grads = [torch.empty_like(t) for t in (q, k, v)]
        cpu.attention_backward(out, q, k, v, out, lse, 0.125, *weights, *grads)
        linear = [] if packed is None else [cpu.linear_packed(x[: 10 + index], packed, 64, None, None, True)]
        return [out, lse, *grads, *linear]

    expected = [work(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, index in zip(pool.map(work, list(range(4)) * 6), list(range(4)) * 6, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, expected[index], strict=True))


def test_peak_counts_its_own_flops(unit: str) -> None:
    one, four = (cpu.peak(torch.bfloat16, rounds, 2) for rounds in (1, 4))
    assert four == 4 * one > 0
    assert cpu.peak(torch.float32, 3, 1) > 0
