"""The ops with kernels behind them keep what torch asks of an op: opcheck, compile, checkpointing, autocast."""

import pytest
import torch
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from internvit.ops import layer_scale_residual_norm, qk_norm_attention_qkvpacked, rms_norm

C = 16


def tensors(*shapes, grad=True):
    g = torch.Generator().manual_seed(11)
    return [torch.randn(s, generator=g).requires_grad_(grad) for s in shapes]


def samples():
    x, y, w, b = tensors((2, 3, C), (2, 3, C), (C,), (C,))
    scale = torch.tensor([0.0, 2.0])
    qkv, q, k, v, qw, kw = tensors((2, 3, 3, 2, 8), *[(2, 3, 2, 8)] * 3, (C,), (C,))
    rstd = tensors((2, 3), (2, 3), grad=False)
    fc, fb, gamma = tensors((24, C), (24,), (C,))
    return {
        "rms_norm": (x, w, 1e-6, "fused"),
        "layer_norm": (x, w, b, 1e-6),
        "layer_scale_residual": (x, y, w, scale),
        "layer_scale_residual_norm": (x, y, gamma, scale, w, b, 1e-6, "layer_norm", "fused"),
        "qk_norm_stats": (q, k, 1e-6),
        "qk_norm": (q, k, qw, kw, 1e-6, "fused"),
        "attention": (q, k, v, 0.3, qw, kw, *rstd),
        "qk_norm_attention": (q, k, v, qw, kw, 1e-6, 0.3, "fused"),
        "qk_norm_attention_qkvpacked": (qkv, qw, kw, 1e-6, 0.3, "fused"),
        "linear_gelu": (x, fc, fb, True),
    }


@pytest.mark.parametrize("op", samples())
def test_opcheck(op):
    opcheck(getattr(torch.ops.internvit, op).default, (*samples()[op], "triton"))


class BackwardCalls(TorchDispatchMode):
    """Keeps each call of one of this library's backward ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "internvit" and func.name().endswith("_backward"):
            plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]  # they have no second derivative
            self.calls.append((func, plain))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", samples())
def test_opcheck_backward(op):
    arguments = samples()[op]
    outputs = getattr(torch.ops.internvit, op).default(*arguments, "triton")
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if t.requires_grad]
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    with BackwardCalls() as kept:
        torch.autograd.grad(outputs, leaves, [torch.randn_like(t) for t in outputs], allow_unused=True)
    assert [func.name() for func, _ in kept.calls] == [f"internvit::{op}_backward"]
    for func, args in kept.calls:
        assert args[-1] == "triton"
        opcheck(func, tuple(args))


def loss(x, branch, gamma, weight, qk, backend):
    x, normed = layer_scale_residual_norm(x, branch, weight, gamma=gamma, backend=backend)
    out = qk_norm_attention_qkvpacked(normed.view(2, 3, 1, 2, 8).expand(-1, -1, 3, -1, -1), qk, qk, backend=backend)
    return rms_norm(out.flatten(2) + x, weight, backend=backend).square().sum()


@pytest.mark.parametrize("how", ["compile", "checkpoint", "selective"])
def test_training_graph(how):
    inputs = tensors((2, 3, C), (2, 3, C), (C,), (C,), (C,))
    expected = torch.autograd.grad(loss(*inputs, "reference"), inputs)
    if how == "compile":
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs, "triton")
    elif how == "checkpoint":
        value = checkpoint(loss, *inputs, "triton", use_reentrant=False)
    else:

        def policy(ctx, op, *args, **kwargs):
            kept = op == torch.ops.internvit.qk_norm_attention_qkvpacked.default
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        value = checkpoint(loss, *inputs, "triton", use_reentrant=False, context_fn=contexts)
    for a, b in zip(torch.autograd.grad(value, inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_residual_stream_wide():
    x, branch, weight = tensors((2, 3, C), (2, 3, C), (C,), grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, normed = layer_scale_residual_norm(x, branch.bfloat16(), weight, backend="triton")
    assert out.dtype == torch.float32
    assert normed.dtype == torch.bfloat16


def test_drop_path_is_replayed_by_checkpointing():
    x, branch, weight = tensors((4, 3, C), (4, 3, C), (C,))

    def run(x, branch, weight):
        row_scale = torch.empty(4).bernoulli_(0.5) * 2
        return layer_scale_residual_norm(x, branch, weight, row_scale=row_scale, backend="triton")[1].square().sum()

    grads = []
    for again in (False, True):
        torch.manual_seed(5)
        value = checkpoint(run, x, branch, weight, use_reentrant=False) if again else run(x, branch, weight)
        grads.append(torch.autograd.grad(value, (x, branch, weight)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
