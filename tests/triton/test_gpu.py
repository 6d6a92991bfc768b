"""The kernels on a device: the contract, determinism, batch invariance, devices and streams. Skipped without a GPU."""

import pytest
import torch

from internvit import contract
from internvit.ops import (
    attention,
    backend,
    layer_norm,
    layer_scale_residual,
    layer_scale_residual_norm,
    linear_gelu,
    qk_norm,
    qk_norm_attention,
    rms_norm,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device; none is here"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MODELS = [(25, 128, "rms_norm"), (16, 64, "layer_norm")]


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


def operations(heads, head_dim, kind):
    C = heads * head_dim
    row_scale = torch.tensor([0.0, 1.25], device="cuda")
    norm = {"rms_norm": lambda x, w, b: rms_norm(x, w) + 0 * b, "layer_norm": layer_norm}[kind]
    rows, vector, packed = (2, 1025, C), (C,), (2, 1025, 3, heads, head_dim)
    return {
        kind: (norm, (rows, vector, vector)),
        "layer_scale_residual": (lambda r, b, g: layer_scale_residual(r, b, g, row_scale), (rows, rows, vector)),
        "layer_scale_residual_norm": (
            lambda r, b, g, w: layer_scale_residual_norm(r, b, g, row_scale, w, kind=kind),
            (rows, rows, vector, vector),
        ),
        "qk_norm": (lambda q, k, a, b: qk_norm(q, k, a, b), (*[(2, 1025, heads, head_dim)] * 2, vector, vector)),
        "attention": (lambda p: attention(*p.unbind(2)), (packed,)),
        "qk_norm_attention": (lambda p, a, b: qk_norm_attention(p, None, None, a, b), (packed, vector, vector)),
        "linear_gelu": (linear_gelu, (rows, (2 * C, C), (2 * C,))),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS, ids=["6B", "300M"])
def test_contract_and_determinism(model, dtype):
    for name, (function, shapes) in operations(*model).items():
        inputs = tensors(*shapes, dtype=dtype)
        with backend("triton"):
            actual = gradients(function, inputs)
            for _ in range(2):
                again = gradients(function, inputs)
                assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), f"{name}: not deterministic"
        with backend("reference"):
            truth = gradients(function, [t.double() for t in inputs])
            eager = gradients(function, inputs)
        for i, (a, t, e) in enumerate(zip(actual, truth, eager, strict=True)):
            error, allowed = contract.relative_error(a, t), 2 * contract.relative_error(e, t)
            assert error <= max(allowed, 2 * torch.finfo(dtype).eps), f"{name}, result {i}: {error:.2e} > {allowed:.2e}"


@pytest.mark.parametrize("tokens", [257, 577, 1025, 1297])
@pytest.mark.parametrize("model", MODELS, ids=["6B", "300M"])
def test_batch_invariance(model, tokens):
    heads, head_dim, _ = model
    C = heads * head_dim
    x, qkv = tensors((4, tokens, C), (4, tokens, 3, heads, head_dim), dtype=torch.bfloat16)
    weight = torch.ones(C, device="cuda", dtype=torch.bfloat16)

    def seam(x):
        return layer_scale_residual_norm(x, x, weight, None, weight, backend="triton")[1]

    def attend(qkv):
        return qk_norm_attention(qkv, None, None, weight, weight, backend="triton")

    for function, t in ((seam, x), (attend, qkv)):
        batch = function(t)
        for i in range(4):
            assert torch.equal(batch[i : i + 1], function(t[i : i + 1]))


def test_current_stream_and_no_synchronisation():
    x, weight = tensors((2, 1025, 1024), (1024,), dtype=torch.bfloat16)
    expected = rms_norm(x, weight, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            y = rms_norm(x, weight, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert torch.equal(y, expected)


def test_cuda_graph():
    qkv, weight = tensors((1, 1025, 3, 16, 64), (1024,), dtype=torch.bfloat16)

    def run():
        return qk_norm_attention(qkv, None, None, weight, weight, backend="triton")

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
    y = rms_norm(x, weight, backend="triton")
    assert y.device.index == 1
    assert torch.equal(y.cpu(), rms_norm(x.to("cuda:0"), weight.to("cuda:0"), backend="triton").cpu())
