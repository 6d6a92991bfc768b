"""The library on a device: contract, determinism, batch invariance, alignment, streams. Skipped without a GPU."""

import pytest
import torch

from internvit import contract
from internvit.ops import (
    backend,
    layer_norm,
    layer_scale_residual,
    layer_scale_residual_norm,
    linear_gelu,
    qk_norm,
    qk_norm_attention,
    qk_norm_stats,
    rms_norm,
)
from internvit.ops.backends import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none is here"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = [(25, 128, "rms_norm"), (16, 64, "layer_norm")]
models = pytest.mark.parametrize("model", MODELS, ids=["6B", "300M"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def the_library() -> None:
    assert BACKENDS["cuda"].missing() is None, BACKENDS["cuda"].missing()


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


def operations(heads, head_dim, kind, tokens=1025):
    C = heads * head_dim
    row_scale = torch.tensor([0.0, 1.25], device="cuda")
    norm = {"rms_norm": lambda x, w, b: rms_norm(x, w) + 0 * b, "layer_norm": layer_norm}[kind]
    rows, vector, packed = (2, tokens, C), (C,), (2, tokens, 3, heads, head_dim)
    return {
        kind: (norm, (rows, vector, vector)),
        "layer_scale_residual": (lambda r, b, g: layer_scale_residual(r, b, g, row_scale), (rows, rows, vector)),
        "layer_scale_residual_norm": (
            lambda r, b, g, w: layer_scale_residual_norm(r, b, g, row_scale, w, kind=kind),
            (rows, rows, vector, vector),
        ),
        "qk_norm_stats": (lambda p: qk_norm_stats(*p.unbind(2)[:2]), (packed,)),
        "qk_norm": (lambda p, a, b: qk_norm(*p.unbind(2)[:2], a, b), (packed, vector, vector)),
        "qk_norm_attention": (lambda p, a, b: qk_norm_attention(p, None, None, a, b), (packed, vector, vector)),
        "linear_gelu": (linear_gelu, (rows, (2 * C, C), (2 * C,))),
    }


@dtypes
@models
def test_contract_and_determinism(model, dtype):
    for name, (function, shapes) in operations(*model).items():
        inputs = tensors(*shapes, dtype=dtype)
        with backend("cuda"):
            actual = gradients(function, inputs)
            for _ in range(2 if "attention" not in name else 0):  # SDPA's backward is torch's
                again = gradients(function, inputs)
                assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), f"{name}: not deterministic"
        with backend("reference"):
            truth = gradients(function, [t.double() for t in inputs])
            eager = gradients(function, inputs)
        for i, (a, t, e) in enumerate(zip(actual, truth, eager, strict=True)):
            error, allowed = contract.relative_error(a, t), 2 * contract.relative_error(e, t)
            assert error <= max(allowed, 2 * torch.finfo(dtype).eps), f"{name}, result {i}: {error:.2e} > {allowed:.2e}"


@dtypes
@pytest.mark.parametrize("channels", [1, 7, 40, 384, 1025, 1152, 8192])
def test_odd_widths_and_few_rows(channels, dtype):
    for rows in (1, 3, 257):
        inputs = tensors((rows, channels), (channels,), (channels,), dtype=dtype)
        with backend("cuda"):
            actual = gradients(layer_norm, inputs)
        with backend("reference"):
            truth = gradients(layer_norm, [t.double() for t in inputs])
        for a, t in zip(actual, truth, strict=True):
            scale = t.abs().max().clamp_min(1e-3)
            assert channels == 1 or ((a.double() - t).abs().max() / scale) < 4 * torch.finfo(dtype).eps


@dtypes
@pytest.mark.parametrize("channels", [1024, 3200])
def test_misaligned_tensors_have_the_same_bits(channels, dtype):
    x, weight = tensors((5, channels), (channels,), dtype=dtype)
    room = torch.empty(5, channels + 3, dtype=dtype, device="cuda")
    room[:, 1:-2] = x
    assert torch.equal(rms_norm(x, weight, backend="cuda"), rms_norm(room[:, 1:-2], weight, backend="cuda"))


@pytest.mark.parametrize("tokens", [257, 577, 1025, 1297])
@models
def test_batch_invariance(model, tokens):
    heads, head_dim, kind = model
    C = heads * head_dim
    (x,) = tensors((4, tokens, C), dtype=torch.bfloat16)
    weight = torch.ones(C, device="cuda", dtype=torch.bfloat16)
    batch = layer_scale_residual_norm(x, x, weight, None, weight, kind=kind, backend="cuda")[1]
    for i in range(4):
        one = x[i : i + 1]
        alone = layer_scale_residual_norm(one, one, weight, None, weight, kind=kind, backend="cuda")[1]
        assert torch.equal(batch[i : i + 1], alone)


def test_rows_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    x = torch.ones(2**21 + 3, 1024, device="cuda", dtype=torch.bfloat16)
    x[-1] = 3
    y = rms_norm(x, torch.ones(1024, device="cuda", dtype=torch.bfloat16), backend="cuda")
    assert bool((y[-1] == 1).all())
    assert bool((y[-2] == 1).all())


def test_current_stream_and_no_synchronisation():
    x, weight = tensors((2, 1025, 1024), (1024,), dtype=torch.bfloat16)
    expected = rms_norm(x, weight, backend="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            y = rms_norm(x, weight, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph():
    x, weight = tensors((2, 1025, 1024), (1024,), dtype=torch.bfloat16)

    def run():
        return layer_scale_residual_norm(x, x, weight, None, weight, backend="cuda")[1]

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    y.fill_(float("nan"))
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_tensors_on_another_device():
    x, weight = (t.to("cuda:1") for t in tensors((2, 17, 1024), (1024,), dtype=torch.bfloat16))
    y = rms_norm(x, weight, backend="cuda")
    assert y.device.index == 1
    assert torch.equal(y.cpu(), rms_norm(x.to("cuda:0"), weight.to("cuda:0"), backend="cuda").cpu())
