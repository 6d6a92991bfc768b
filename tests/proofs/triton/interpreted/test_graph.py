"""The ops with kernels behind them keep what torch asks of an op: opcheck, compile, checkpointing, autocast."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from internvit.ops import layer_scale_residual_norm, qk_norm_attention_qkvpacked, rms_norm
from internvit.ops.backends.registry import BACKENDS, has_implementation
from internvit.ops.core.spec import SPECS, TINY, Inputs
from tests.support.implementations import op_calls

C = 16


def tensors(*shapes, grad=True):
    g = torch.Generator().manual_seed(11)
    return [torch.randn(s, generator=g).requires_grad_(grad) for s in shapes]


CASES = {
    " ".join(filter(None, (backend, name, variant))): (backend, spec, example)
    for backend in ("triton", "triton_gemm")
    for name, spec in SPECS.items()
    if has_implementation(spec.implemented_as, backend)
    for variant, example in spec.examples.items()
    if BACKENDS[backend].lacks(**spec.demands(variant)) is None
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CASES)
def test_opcheck(case):
    backend, spec, example = CASES[case]
    forward, backward = op_calls(spec, example(Inputs(TINY)), backend)
    assert backward.op.name == f"{spec.op}_backward"
    names = [a.name for a in forward.op.overload._schema.arguments]
    for name, t in zip(names, forward.args, strict=False):
        if isinstance(t, torch.Tensor) and name != "row_scale":  # which has no gradient
            t.requires_grad_(t.is_floating_point())
    opcheck(forward.op.overload, (*forward.args, backend))
    opcheck(backward.op.overload, (*backward.args, backend))


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
