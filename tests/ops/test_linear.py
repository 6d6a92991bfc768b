"""The Linear that the model's own come from: an image's bits, and products where a CPU has none of the dtype."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import profile

import internvit
from internvit import InternViT, InternViTConfig
from internvit.model.embeddings import convolve
from internvit.numerics import relative_error, sample
from internvit.ops import linear as module
from internvit.ops.backends import native
from internvit.ops.linear import cpu_multiplies, linear, matmul, trained_linear
from tests.support.models import random_weights

sixteen_bits = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def emulating(monkeypatch):
    """A CPU without products of 16-bit dtypes."""
    monkeypatch.setattr(module, "cpu_multiplies", lambda dtype: dtype.itemsize != 2)


@sixteen_bits
@pytest.mark.parametrize("rows", [16, 257])
def test_emulated_products_are_rounded_once(emulating, dtype, rows, generator) -> None:
    x, weight, bias = (sample(shape, "normal", dtype, generator) for shape in ((3, rows, 40), (24, 40), (24,)))
    truth = F.linear(x.double(), weight.double(), bias.double())
    once = relative_error(truth.to(dtype), truth)
    for y in (linear(x, weight, bias), trained_linear(x, weight, bias), linear(x.flatten(0, 1), weight, bias)):
        assert y.dtype == dtype
        assert relative_error(y.view_as(truth), truth) <= 1.01 * once
    assert torch.equal(linear(x, weight, bias)[1:2], linear(x[1:2], weight, bias))
    assert linear(x[:0], weight, bias).shape == (0, rows, 24)
    product, true_product = matmul(x[0], weight.t()), x[0].double() @ weight.double().t()
    assert relative_error(product, true_product) <= 1.01 * relative_error(true_product.to(dtype), true_product)


def test_one_image_at_a_time_is_held_in_float32(emulating, monkeypatch) -> None:
    """A batch's float32 copy took twice its memory, beside its output's."""
    x, weight = torch.ones(8, 32, 40, dtype=torch.bfloat16), torch.ones(24, 40, dtype=torch.bfloat16)
    plain, rows = F.linear, []
    monkeypatch.setattr(module.F, "linear", lambda x, *others: rows.append(x.shape) or plain(x, *others))
    linear(x, weight, None)
    assert rows == [(32, 40)] * 8


@sixteen_bits
def test_emulated_gradients_are_those_of_float64(emulating, dtype, generator) -> None:
    shapes = ((2, 65, 40), (24, 40), (24,))
    operands = [sample(shape, "normal", dtype, generator).requires_grad_() for shape in shapes]
    grad = sample((2, 65, 24), "normal", dtype, generator)
    y = trained_linear(*operands)
    assert type(y.grad_fn).__name__ == "_WidenedBackward"
    found = torch.autograd.grad(y, operands, grad, create_graph=True)
    wide = [t.detach().double().requires_grad_() for t in operands]
    truth = torch.autograd.grad(F.linear(*wide), wide, grad.double(), create_graph=True)
    for a, t in zip(found, truth, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, t) <= 1.5 * relative_error(t.to(dtype), t)
    # The gradient of a gradient: of x's by the weight.
    (again,), (true_again,) = (
        torch.autograd.grad(g[0].square().sum(), leaf[1]) for g, leaf in ((found, operands), (truth, wide))
    )
    assert relative_error(again, true_again) <= 8 * torch.finfo(dtype).eps


def test_emulated_products_under_autocast(emulating, generator) -> None:
    """They are of bfloat16 operands, as PyTorch's Linear casts them, and stay out of autocast themselves."""
    x = sample((2, 65, 40), "normal", torch.float32, generator)
    weight = sample((24, 40), "normal", torch.float32, generator).requires_grad_()
    rounded = F.linear(x.bfloat16().double(), weight.bfloat16().double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for y in (linear(x, weight.detach(), None), trained_linear(x, weight, None)):
            assert y.dtype == torch.bfloat16
            assert relative_error(y, rounded) <= 1.01 * relative_error(rounded.bfloat16(), rounded)
        y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_operands_of_two_dtypes_are_refused_as_ever(emulating) -> None:
    x, weight = torch.ones(2, 32, 8, dtype=torch.bfloat16), torch.ones(4, 8)
    for call in (linear, trained_linear):
        with pytest.raises(RuntimeError, match="dtype"):
            call(x, weight, None)


@sixteen_bits
def test_emulated_patch_embedding(emulating, dtype, generator) -> None:
    conv = nn.Conv2d(3, 40, kernel_size=14, stride=14).to(dtype)
    pixels = sample((2, 3, 56, 42), "normal", dtype, generator)
    wide = nn.Conv2d(3, 40, kernel_size=14, stride=14).double()
    wide.load_state_dict(conv.state_dict())
    y, truth = convolve(conv, pixels), wide(pixels.double())
    assert y.dtype == dtype
    assert relative_error(y, truth) <= 1.01 * relative_error(truth.to(dtype), truth)
    calls: list[int] = []
    conv.register_forward_hook(lambda *_: calls.append(1))
    convolve(conv, pixels)
    assert calls == [1]


@sixteen_bits
@pytest.mark.parametrize("norm_type", ["layer_norm", "rms_norm"])
def test_a_model_trains_on_a_cpu_that_emulates(monkeypatch, dtype, norm_type, generator) -> None:
    """Its features and gradients are as near to float64's as with the CPU's own products."""
    shape = dict(hidden_size=96, intermediate_size=192, num_attention_heads=4, num_hidden_layers=2, image_size=56)
    kind = dict(norm_type=norm_type, qk_normalization=norm_type == "rms_norm", drop_path_rate=0.0)
    torch.manual_seed(0)
    model = InternViT(InternViTConfig(**shape, **kind)).to(dtype)
    wide = InternViT(model.config).double()
    wide.load_state_dict(model.state_dict())
    pixels = sample((2, 3, 56, 56), "normal", dtype, generator)
    grad = sample((2, 17, 96), "normal", dtype, generator)

    def run(network: InternViT, cast: torch.dtype) -> list[torch.Tensor]:
        y = network(pixels.to(cast)).last_hidden_state
        return [y, *torch.autograd.grad(y, list(network.parameters()), grad.to(cast))]

    truth = run(wide, torch.float64)
    for emulates in (False, True):
        monkeypatch.setattr(module, "cpu_multiplies", lambda dtype, no=emulates: not (no and dtype.itemsize == 2))
        for a, t in zip(run(model, dtype), truth, strict=True):
            assert relative_error(a, t) <= 32 * torch.finfo(dtype).eps, emulates


def test_a_profiler_changes_no_bit(generator) -> None:
    """A profiled batch took the batch's own GEMM, whose blocking and last bits are others: 257 rows of an image."""
    x, weight = (sample(shape, "normal", torch.bfloat16, generator) for shape in ((2, 257, 1024), (3072, 1024)))
    alone = linear(x, weight, None)
    with profile():
        profiled = linear(x, weight, None)
    assert torch.equal(alone, profiled)
    with profile() as found:
        linear(x, weight, None)
    assert next(e.count for e in found.key_averages() if e.key == "aten::linear") == 2, "one call an image"


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")], ids=str)
@pytest.mark.parametrize("unit", ["avx512", "amx", "avx_ne_convert", None])
def test_what_a_cpu_multiplies(monkeypatch, dtype, kind, unit) -> None:
    name = f"{unit}_{kind}" if unit in ("avx512", "amx") else unit
    has = {"avx512_bf16": False, "avx512_fp16": False, "amx_bf16": False, "amx_fp16": False, "avx_ne_convert": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has | ({} if name is None else {name: True}), False)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    assert cpu_multiplies.__wrapped__(dtype) == (unit is not None)
    assert cpu_multiplies.__wrapped__(torch.float32)
    assert cpu_multiplies.__wrapped__(torch.float64)
    monkeypatch.setattr(module.platform, "machine", lambda: "aarch64")
    assert cpu_multiplies.__wrapped__(dtype)


@pytest.fixture
def avx2():
    """The CPU library's AVX2 unit in use, on any x86 machine."""
    if native.unavailable_reason("internvit_cpu") or "avx2" not in torch.ops.internvit_cpu.instruction_sets().split():
        pytest.skip("internvit_cpu is not built for AVX2 here")
    before = torch.ops.internvit_cpu.use_instruction_set("avx2")
    yield
    torch.ops.internvit_cpu.use_instruction_set(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_with_avx2_the_library_multiplies(avx2, dtype, generator, monkeypatch) -> None:
    """An image at a time: the same bits for one alone and in a batch, whatever the layout."""
    x, weight, bias = (sample(shape, "normal", dtype, generator) for shape in ((3, 130, 1000), (70, 1000), (70,)))
    calls, packed = [], torch.ops.internvit_cpu.linear_packed
    monkeypatch.setattr(torch.ops.internvit_cpu, "linear_packed", lambda *args: calls.append(args) or packed(*args))
    truth = F.linear(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        y = linear(x, weight, bias)
        assert [args[0].shape for args in calls] == [(130, 1000)] * 3
        assert y.dtype == dtype
        rounded = relative_error(truth.to(dtype), truth)
        assert relative_error(y, truth) < (1.01 * rounded if dtype == torch.bfloat16 else 5e-7)
        assert torch.equal(linear(x[1:2], weight, bias), y[1:2])
        assert torch.equal(linear(x.transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t(), bias), y)
        before = len(calls)
        assert linear(x[:, :127], weight, bias).shape == (3, 127, 70)  # for which packing takes longer than it saves
        with internvit.backend("reference"):
            linear(x, weight, bias)
        internvit.ops.linear_gelu(x, weight, bias, backend="reference")
        assert linear(x, weight[:0], bias[:0]).shape == (3, 130, 0)
        assert linear(x, weight, bias[:1]).shape == (3, 130, 70)  # PyTorch's broadcasts
    weight = weight.clone().requires_grad_()
    trained_linear(x, weight, bias).sum().backward()
    assert len(calls) == before
    assert weight.grad is not None


@pytest.mark.sampled(4)
@pytest.mark.parametrize("precision", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_models_with_avx2(avx2, dtype, precision, generator) -> None:
    """Optimised in bfloat16, float32 and int8, and eager, of 145 tokens: by the library's products."""
    if precision and dtype == torch.float32:
        pytest.skip("int8 is for bfloat16 models")
    config = InternViTConfig.from_name("internvit-300m-448px-v2.5")
    config = config.replace(num_hidden_layers=2, image_size=168, name=None)
    exact = internvit.reference.InternViT(config).double().eval()
    random_weights(exact)
    model = InternViT(config, dtype=dtype).eval()
    model.load_state_dict(exact.state_dict())
    exact.load_state_dict(model.state_dict())
    fast = internvit.optimize_for_inference(model, precision=precision, skip=() if precision else None)
    assert "2 of 2 layers packed" in repr(fast)
    pixels = torch.randn(2, 3, 168, 168, generator=generator).to(dtype)
    truth = exact(pixels.double()).last_hidden_state
    with torch.no_grad():
        allowed = relative_error(model(pixels).last_hidden_state, truth)
        found = fast(pixels).last_hidden_state
    assert allowed < (0.02 if dtype == torch.bfloat16 else 2e-6)
    assert relative_error(found, truth) < (0.04 if precision else (1.1 if dtype == torch.bfloat16 else 1.5) * allowed)
    assert torch.equal(fast(pixels[:1]).last_hidden_state, found[:1])
