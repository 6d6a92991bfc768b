"""The GEMM of `triton_gemm` with each of its epilogues against float64."""

import pytest
import torch
from torch.nn import functional as F

import internvit
from internvit import InternViT, InternViTConfig, numerics
from internvit.kernels import linear as kernels
from internvit.ops import gelu, linear_gelu, linear_layer_scale
from internvit.ops.core.select import resolve
from internvit.ops.linear_gelu import linear_gelu_with_pre_activation
from tests.proofs.triton.interpreted.harness import (
    CHANNELS,
    DTYPES,
    ROWS,
    STRIDES,
    Memory,
    fits,
    generator,
    parametrize,
    run,
    skip_unless_numpy_rows_are_alike,
)
from tests.support.models import features, opengvlab_judge, timm_judge, transformers_judge

BACKEND = "triton_gemm"
OUT = (1, 72, 136, 300)


@parametrize(
    full=("rows", "channels", "out", "dtype", "epilogue"),
    allowed=fits,
    rows=ROWS,
    channels=CHANNELS,
    out=OUT,
    dtype=DTYPES,
    distribution=("normal", "near_zero", "massive"),
    strides=STRIDES,
    bias=("same", "none"),
    epilogue=("gelu", "gelu, saved", "layer_scale", "residual", "float32 residual"),
)
def test_epilogues(case):
    g, memory, dtype = generator(case), Memory(), getattr(torch, case["dtype"])
    rows, K, N = case["rows"], case["channels"], case["out"]
    x = memory.place(numerics.sample((1, rows, K), case["distribution"], dtype, g), case["strides"])
    weight = memory.place((torch.randn(N, K, generator=g) * K**-0.5).to(dtype), case["strides"])
    bias = None if case["bias"] == "none" else memory.place(torch.randn(N, generator=g).to(dtype))
    pre = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    if case["epilogue"].startswith("gelu"):
        saved = case["epilogue"] == "gelu, saved"
        actual = run(memory, "linear_gelu", x, weight, bias, saved, backend=BACKEND)
        truths = [F.gelu(pre), pre] if saved else [F.gelu(pre)]
        rounded = pre.to(dtype)
        emulations = [F.gelu(rounded.double()).to(dtype), rounded]
        if saved:
            assert torch.equal(actual[0], gelu(actual[1], backend=BACKEND)), "recomputing must give the same bits"
    else:
        gamma = memory.place(torch.randn(N, generator=g))
        residual, truth = None, pre * gamma.double()
        if "residual" in case["epilogue"]:
            kind = torch.float32 if case["epilogue"].startswith("float32") else dtype
            residual = memory.place(torch.randn(1, rows, N, generator=g).to(kind), case["strides"])
            truth += residual.double()
        actual = run(memory, "linear_layer_scale", x, weight, bias, gamma, residual, backend=BACKEND)
        truths, emulations = [truth], [truth.to(actual[0].dtype)]
    if dtype == torch.float32 or emulations[0].dtype == torch.float32:  # sums of K float32 products
        eager = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        wide = (numerics.relative_error(eager, pre), 16 * torch.finfo(torch.float32).eps)
        for a, t in zip(actual, truths, strict=False):
            assert numerics.relative_error(a, t) <= 4 * max(wide)
        return
    for a, t, e in zip(actual, truths, emulations, strict=False):
        assert numerics.product_violations(a, t, e) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("epilogue", ["gelu", "residual"])
def test_an_image_has_the_same_bits_in_any_batch(dtype, epilogue):
    """Rows stand at other places of other tiles, whose number is the batch's."""
    skip_unless_numpy_rows_are_alike()
    g, dtype = torch.Generator().manual_seed(3), getattr(torch, dtype)
    x, residual = (torch.randn(3, 50, n, generator=g).to(dtype) for n in (96, 136))
    weight, vector = torch.randn(136, 96, generator=g).to(dtype), torch.randn(136, generator=g).to(dtype)

    def op(images):
        if epilogue == "gelu":
            return linear_gelu(x[images], weight, vector, backend=BACKEND)
        return linear_layer_scale(x[images], weight, vector, vector, residual[images], backend=BACKEND)

    whole = op(slice(None))
    for i in range(3):
        assert torch.equal(whole[i], op(slice(i, i + 1))[0])


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (40,)])
def test_no_rows_and_one_dimension(shape):
    x, weight, vector = torch.randn(shape), torch.randn(24, 40), torch.randn(24)
    residual = torch.randn(*shape[:-1], 24)
    for op in (
        lambda backend: linear_gelu(x, weight, vector, backend=backend),
        lambda backend: linear_layer_scale(x, weight, vector, None, residual, backend=backend),
    ):
        torch.testing.assert_close(op(BACKEND), op("reference"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype):
    g, dtype = torch.Generator().manual_seed(4), getattr(torch, dtype)
    x, weight, bias, gamma, residual, grad = (
        torch.randn(s, generator=g).to(dtype) for s in ((2, 9, 40), (24, 40), (24,), (24,), (2, 9, 24), (2, 9, 24))
    )
    wide = torch.float64
    for op, formula, inputs in (
        (linear_gelu, lambda x, w, b: F.gelu(F.linear(x, w, b)), (x, weight, bias)),
        (linear_layer_scale, lambda x, w, c, b, r: r + F.linear(x, w, b) * c, (x, weight, gamma, bias, residual)),
    ):
        leaves = [t.clone().requires_grad_() for t in inputs]
        exact = [t.to(wide).requires_grad_() for t in inputs]
        actual = torch.autograd.grad(op(*leaves, backend=BACKEND), leaves, grad)
        truth = torch.autograd.grad(formula(*exact), exact, grad.to(wide))
        for a, t in zip(actual, truth, strict=True):
            assert numerics.relative_error(a, t) <= 4 * torch.finfo(dtype).eps


def test_float16_keeps_a_gamma_that_its_weight_cannot_hold():
    """gamma * weight is 0 in float16 (5e-9); in the epilogue gamma is float32, and backward scales the gradient."""
    g = torch.Generator().manual_seed(5)
    x, grad = torch.randn(5, 64, generator=g).half(), 1e3 * torch.randn(5, 8, generator=g).half()
    weight, gamma = (1e-4 * torch.randn(8, 64, generator=g)).half(), torch.full((8,), 5e-5)
    leaves = [t.requires_grad_() for t in (x, weight, gamma)]
    residual = torch.zeros(5, 8)  # float32
    y = linear_layer_scale(*leaves, residual=residual, backend=BACKEND)
    (grad_x,) = torch.autograd.grad(y, x, grad.float())
    assert numerics.relative_error(y, x.double() @ weight.double().t() * gamma.double()) < 1e-5
    assert numerics.relative_error(grad_x, (grad.double() * gamma.double()) @ weight.double()) < 5e-3


def test_ops_that_the_backend_lacks_run_on_triton():
    x = torch.randn(2, 8)
    with internvit.backend(BACKEND):
        assert resolve("linear_gelu", x) == resolve("linear_layer_scale", x) == BACKEND
        assert resolve("rms_norm", x) == "triton"
    with internvit.backend("triton"):
        assert resolve("linear_gelu", x) == "triton"
    assert resolve("linear_gelu", x) != BACKEND


def test_gelu_is_rebuilt_by_the_backend_that_is_named():
    x, weight = torch.randn(3, 40).bfloat16(), torch.randn(24, 40).bfloat16()
    y, pre_activation, name = linear_gelu_with_pre_activation(x, weight, None, backend=BACKEND)
    assert torch.equal(gelu(pre_activation, backend=name), y)


def test_compiled_graphs_keep_the_backend():
    inputs = [t.requires_grad_() for t in (torch.randn(2, 3, 40), torch.randn(24, 40), torch.randn(24))]

    def loss(*inputs):
        return linear_gelu(*inputs, backend=BACKEND).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def tiny(**changes):
    config = InternViTConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=2, image_size=28, **changes
    )
    torch.manual_seed(7)
    return InternViT(config)


def multiplied(monkeypatch):
    """The GEMMs that run from now on: whether they end in GELU, keep what it is taken of, and add a residual."""
    seen, multiply = [], kernels.multiply

    def spy(config, x, weight, bias, gamma, residual, gelu, save, *quantized):
        seen.append((gelu, save, residual is not None))
        return multiply(config, x, weight, bias, gamma, residual, gelu, save, *quantized)

    monkeypatch.setattr(kernels, "multiply", spy)
    return seen


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_model_takes_both_gemms(norm_type, monkeypatch):
    """Without gradients the residual is in the epilogue of proj and fc2; with them GELU alone is in fc1's."""
    model, pixels = tiny(norm_type=norm_type).eval(), torch.randn(2, 3, 28, 28)
    seen = multiplied(monkeypatch)
    results = []
    for name in (BACKEND, "reference"):
        with internvit.backend(name), torch.no_grad():
            results.append(model(pixels).last_hidden_state)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert seen == 2 * [(False, False, True), (True, False, False), (False, False, True)]
    seen.clear()
    gradients = []
    for name in (BACKEND, "reference"):
        model.zero_grad()
        with internvit.backend(name):
            model.train()(pixels).last_hidden_state.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert seen == 2 * [(True, True, False)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("judge", [opengvlab_judge, transformers_judge, timm_judge])
def test_a_patched_model_takes_both_gemms(judge, monkeypatch):
    """The residual stood outside the GEMMs of patched blocks, in a pass of its own."""
    own = tiny(norm_type="layer_norm", qkv_bias=True, qk_normalization=False)
    pixels = torch.randn(2, 3, 28, 28)
    model = judge(own.config, own.state_dict()).eval()
    seen = multiplied(monkeypatch)
    with torch.no_grad():
        expected = features(model, pixels)
        with internvit.patch(model), internvit.backend(BACKEND):
            torch.testing.assert_close(features(model, pixels), expected, rtol=1e-4, atol=1e-4)
    assert seen == 2 * [(False, False, True), (True, False, False), (False, False, True)]


def test_too_many_outputs_are_refused():
    weight = torch.empty(1, 1).expand(kernels.MAX_STRIDE, 1)
    with pytest.raises(ValueError, match=r"weight must have fewer than 16777216 rows .*, got 16777216"):
        linear_gelu(torch.ones(1, 1), weight, backend=BACKEND)
