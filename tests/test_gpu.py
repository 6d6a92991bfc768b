"""The GPU backends on a device: contract, determinism, batch invariance, alignment, streams. Skipped without a GPU."""

import pytest
import torch

from internvit import numerics
from internvit.ops import (
    backend,
    layer_norm,
    layer_scale_residual_norm,
    linear_gelu,
    linear_layer_scale,
    qk_norm_attention_qkvpacked,
    rms_norm,
)
from internvit.ops.backends.registry import BACKENDS, backends_for
from internvit.ops.core.spec import INFERENCE_SPECS, SPECS, Inputs, Size, converted, differentiable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; none is here"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = [(25, 128, "rms_norm"), (16, 64, "layer_norm")]
models = pytest.mark.parametrize("model", MODELS, ids=["6B", "300M"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def available(name):
    reason = BACKENDS[name].unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(params=["triton", "cuda"])
def name(request):
    return available(request.param)


@pytest.fixture(params=["triton", "triton_gemm", "cuda"])
def any_name(request):
    return available(request.param)


def tensors(*shapes, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=g).to(dtype).cuda() for s in shapes]


def gradients(function, inputs):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=g).to(o) for o in outs]
    return (*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, grads))


def operations(heads, head_dim, dtype):
    """(name, spec, arguments) of every op at a model's size, without what float16 or the backend refuses."""
    inputs = Inputs(Size(2, 1025, heads, head_dim), torch.Generator().manual_seed(0), dtype, "cuda")
    for spec in SPECS.values():
        for variant, example in spec.examples.items():
            if (spec.name, dtype) != ("linear_layer_scale", torch.float16):
                yield f"{spec.name} {variant}", spec, example(inputs)


def is_torchs(name, op):
    """The CUDA library leaves attention to flash-attn or SDPA: neither its determinism nor its bits are ours."""
    return name == "cuda" and "attention" in op


def with_gradients(spec, arguments, backend):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in differentiable(arguments).items()}
    outs = spec.run({**arguments, **leaves}, backend)
    g = torch.Generator().manual_seed(1)
    grads = [torch.randn(o.shape, generator=g).to(o) for o in outs]
    return (*(o.detach() for o in outs), *torch.autograd.grad(outs, list(leaves.values()), grads))


@dtypes
@models
def test_contract_and_determinism(any_name, model, dtype):
    name = any_name
    for op, spec, arguments in operations(*model[:2], dtype):
        demands = spec.demands(op.removeprefix(spec.name).strip())
        if name not in backends_for(spec.implemented_as, "cuda", dtype, model[1], **demands):
            continue
        actual = with_gradients(spec, arguments, name)
        for _ in range(0 if is_torchs(name, op) else 2):
            again = with_gradients(spec, arguments, name)
            assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), f"{op}: not deterministic"
        truth = with_gradients(spec, converted(arguments, torch.float64), "reference")
        eager = with_gradients(spec, arguments, "reference")
        for i, (a, t, e) in enumerate(zip(actual, truth, eager, strict=True)):
            error, allowed = numerics.relative_error(a, t), 2 * numerics.relative_error(e, t)
            assert error <= max(allowed, 2 * torch.finfo(dtype).eps), f"{op}, result {i}: {error:.2e} > {allowed:.2e}"


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 40, 384, 1025, 1152, 8192])
def test_odd_widths_and_few_rows(name, channels, dtype):
    for rows in (1, 3, 257):
        inputs = tensors((rows, channels), (channels,), (channels,), dtype=dtype)
        with backend(name):
            actual = gradients(layer_norm, inputs)
        with backend("reference"):
            truth = gradients(layer_norm, [t.double() for t in inputs])
        for a, t in zip(actual, truth, strict=True):
            scale = t.abs().max().clamp_min(1e-3)
            assert channels == 1 or ((a.double() - t).abs().max() / scale) < 4 * torch.finfo(dtype).eps


@dtypes
@pytest.mark.parametrize("channels", [1024, 3200])
def test_misaligned_tensors_have_the_same_bits(name, channels, dtype):
    x, weight = tensors((5, channels), (channels,), dtype=dtype)
    room = torch.empty(5, channels + 3, dtype=dtype, device="cuda")
    room[:, 1:-2] = x
    assert torch.equal(rms_norm(x, weight, backend=name), rms_norm(room[:, 1:-2], weight, backend=name))


@pytest.mark.parametrize("tokens", [257, 577, 1025, 1297])
@models
def test_batch_invariance(name, model, tokens):
    heads, head_dim, kind = model
    C = heads * head_dim
    x, qkv = tensors((4, tokens, C), (4, tokens, 3, heads, head_dim), dtype=torch.bfloat16)
    weight = torch.ones(C, device="cuda", dtype=torch.bfloat16)

    def seam(x):
        return layer_scale_residual_norm(x, x, weight, gamma=weight, norm_type=kind, backend=name)[1]

    def attend(qkv):
        return qk_norm_attention_qkvpacked(qkv, weight, weight, backend=name)

    for function, t in ((seam, x), (attend, qkv)):
        if is_torchs(name, function.__name__.replace("attend", "attention")):
            continue
        batch = function(t)
        for i in range(4):
            assert torch.equal(batch[i : i + 1], function(t[i : i + 1]))


@pytest.mark.parametrize("tokens", [257, 1025])
@models
def test_gemms_are_batch_invariant(model, tokens):
    C = model[0] * model[1]
    x, weight, vector = tensors((4, tokens, C), (C, C), (C,), dtype=torch.bfloat16)

    def fc1(x):
        return linear_gelu(x, weight, vector, backend="triton_gemm")

    def proj(x):
        return linear_layer_scale(x, weight, vector, vector, x, backend="triton_gemm")

    for function in (fc1, proj):
        batch = function(x)
        for i in range(4):
            assert torch.equal(batch[i : i + 1], function(x[i : i + 1]))


@dtypes
@models
@pytest.mark.parametrize("op", ["fold_norm", "linear_residual_stats", "norm_linear", "norm_qkv"])
def test_norms_inside_gemms_keep_their_contract(op, model, dtype):
    spec, size = INFERENCE_SPECS[op], Size(2, 1025, *model[:2])
    for arguments in (example(Inputs(size, dtype=dtype, device="cuda")) for example in spec.examples.values()):
        with backend("triton_gemm"):
            outputs = spec.run(arguments)
        assert not spec.violations(arguments, outputs, spec.truth(arguments), outputs)


def test_rows_beyond_2_to_the_31_elements(name):
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.ones(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3
    y = rms_norm(x, torch.ones(1024, device="cuda", dtype=torch.bfloat16), backend=name)
    assert bool((y[-1] == 1).all())
    assert bool((y[-2] == 1).all())


def test_current_stream_and_no_synchronisation(name):
    x, weight = tensors((2, 1025, 1024), (1024,), dtype=torch.bfloat16)
    expected = rms_norm(x, weight, backend=name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            y = rms_norm(x, weight, backend=name)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph(name):
    x, qkv, weight = tensors((2, 1025, 1024), (1, 1025, 3, 16, 64), (1024,), dtype=torch.bfloat16)

    def run():
        normed = layer_scale_residual_norm(x, x, weight, gamma=weight, backend=name)[1]
        return normed, qk_norm_attention_qkvpacked(qkv, weight, weight, backend=name)

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for result in results:
        result.fill_(float("nan"))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_on_another_device(name):
    x, weight = (t.to("cuda:1") for t in tensors((2, 17, 1024), (1024,), dtype=torch.bfloat16))
    y = rms_norm(x, weight, backend=name)
    assert y.device.index == 1
    assert torch.equal(y.cpu(), rms_norm(x.to("cuda:0"), weight.to("cuda:0"), backend=name).cpu())
