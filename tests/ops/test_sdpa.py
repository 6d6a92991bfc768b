"""Backend `sdpa` on a GPU calls torch's own forward and backward kernels, with the log-sum-exp between them.

No GPU is needed: the tensors are fake, and the calls are recorded.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

from internvit.numerics import relative_error
from internvit.ops.attention import SavedAttention
from internvit.ops.backends import sdpa

KERNELS = {
    SDPBackend.FLASH_ATTENTION: "_scaled_dot_product_flash_attention",
    SDPBackend.EFFICIENT_ATTENTION: "_scaled_dot_product_efficient_attention",
    SDPBackend.CUDNN_ATTENTION: "_scaled_dot_product_cudnn_attention",
}


SCHEMAS = {
    "_scaled_dot_product_flash_attention": "query key value dropout_p is_causal return_debug_mask scale"
    " -> output logsumexp cum_seq_q cum_seq_k max_q max_k rng_state unused debug_attn_mask",
    "_scaled_dot_product_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q"
    " max_k dropout_p is_causal philox_seed philox_offset scale -> grad_query grad_key grad_value",
    "_scaled_dot_product_efficient_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal scale"
    " -> output log_sumexp philox_seed philox_offset",
    "_scaled_dot_product_efficient_attention_backward": "grad_out_ query key value attn_bias out logsumexp philox_seed"
    " philox_offset dropout_p grad_input_mask is_causal scale ->    ",
    "_scaled_dot_product_cudnn_attention": "query key value attn_bias compute_log_sumexp dropout_p is_causal"
    " return_debug_mask scale -> output logsumexp cum_seq_q cum_seq_k max_q max_k philox_seed philox_offset"
    " debug_attn_mask",
    "_scaled_dot_product_cudnn_attention_backward": "grad_out query key value out logsumexp philox_seed philox_offset"
    " attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p is_causal scale ->   ",
    "_scaled_dot_product_flash_attention_for_cpu": "query key value dropout_p is_causal attn_mask scale"
    " -> output logsumexp",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "grad_out query key value out logsumexp dropout_p is_causal"
    " attn_mask scale -> grad_query grad_key grad_value",
}
"""The arguments and outputs that the backend's calls are written against, by position; unnamed outputs are empty."""


@pytest.mark.parametrize("op", SCHEMAS)
def test_torch_has_the_recorded_schema(op):
    schema = getattr(torch.ops.aten, op).default._schema
    arguments, outputs = ([a.name for a in part] for part in (schema.arguments, schema.returns))
    expected_arguments, expected_outputs = SCHEMAS[op].split(" -> ")
    assert arguments == expected_arguments.split(" ")
    assert outputs == expected_outputs.split(" ")


def test_every_kernel_that_is_called_is_recorded():
    called = {op for name in KERNELS.values() for op in (name, f"{name}_backward")}
    assert called <= set(SCHEMAS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cpu_kernels_backward_takes_its_own_log_sum_exp(dtype, generator):
    """The same path as on a GPU: forward's out and lse, strided q, k, v and gradients, a scale of its own."""
    q, k, v = torch.randn(2, 33, 3, 4, 16, generator=generator).to(dtype).unbind(2)
    grads = torch.full((2, 33, 3, 4, 16), torch.nan, dtype=dtype).unbind(2)
    grad = torch.randn(2, 33, 4, 16, generator=generator).to(dtype)
    with Calls() as calls:
        out, lse = sdpa.attention(q, k, v, 0.3)
        sdpa.attention_backward(grad, SavedAttention(q, k, v, out, lse, 0.3, None), grads)
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in calls.shapes
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    scores = torch.einsum("bnhd,bmhd->bhnm", *leaves[:2]) * 0.3
    truth = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), leaves[2])
    for actual, exact in zip(grads, torch.autograd.grad(truth, leaves, grad.double()), strict=True):
        assert relative_error(actual, exact) < 4 * torch.finfo(dtype).eps
    assert relative_error(lse, scores.detach().logsumexp(-1)) < 4 * torch.finfo(dtype).eps


class Calls(TorchDispatchMode):
    """Records the aten ops that are called, with the shapes of their tensors."""

    def __init__(self):
        super().__init__()
        self.shapes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.shapes[func._opname] = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        return func(*args, **(kwargs or {}))


def calls_of(monkeypatch, choice, dtype, head_dim=64):
    """The aten ops that forward and backward call when SDPA would take `choice`."""
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *args, **kwargs: choice.value)
    with FakeTensorMode(), Calls() as calls:
        q, k, v = torch.empty(2, 1025, 3, 4, head_dim, device="cuda", dtype=dtype).unbind(2)
        grads = torch.empty(2, 1025, 3, 4, head_dim, device="cuda", dtype=dtype).unbind(2)
        out, lse = sdpa.attention(q, k, v, 0.1)
        assert out.shape == q.shape
        assert out.is_contiguous()
        assert lse.shape == (2, 4, 1025)
        assert lse.dtype == torch.float32
        sdpa.attention_backward(out, SavedAttention(q, k, v, out, lse, 0.1, None), grads)
    return calls.shapes


@pytest.mark.parametrize("choice", KERNELS, ids=lambda choice: choice.name)
def test_backward_is_the_kernels_own(choice, monkeypatch):
    shapes = calls_of(monkeypatch, choice, torch.bfloat16)
    assert KERNELS[choice] in shapes
    lse = {"FLASH_ATTENTION": (2, 4, 1025), "EFFICIENT_ATTENTION": (2, 4, 1056), "CUDNN_ATTENTION": (2, 4, 1025, 1)}
    assert lse[choice.name] in shapes[f"{KERNELS[choice]}_backward"]
    assert "bmm" not in shapes, "the plain formula ran"


def test_float32_takes_the_efficient_kernel(monkeypatch):
    shapes = calls_of(monkeypatch, SDPBackend.EFFICIENT_ATTENTION, torch.float32)
    assert "_scaled_dot_product_efficient_attention_backward" in shapes


@pytest.mark.parametrize(
    ("choice", "head_dim"), [(SDPBackend.MATH, 64), (SDPBackend.FLASH_ATTENTION, 20)], ids=["no kernel", "head_dim 20"]
)
def test_where_no_kernel_fits_the_formula_runs(choice, head_dim, monkeypatch):
    shapes = calls_of(monkeypatch, choice, torch.float32, head_dim)
    assert "bmm" in shapes
    assert not any(name.startswith("_scaled_dot_product") for name in shapes)


def test_the_formula_is_attention_and_its_gradient():
    q, k, v, grad = (torch.randn(3, 2, 9, 5, dtype=torch.float64) for _ in range(4))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.4)
    expected_grads = torch.autograd.grad(expected, (q, k, v), grad)
    with torch.no_grad():
        out, lse = sdpa._plain(q, k, v, 0.4)
        grads = sdpa._plain_backward(grad, q, k, v, out, lse, 0.4)
    torch.testing.assert_close(out, expected.detach())
    torch.testing.assert_close(lse, (q @ k.transpose(-1, -2) * 0.4).logsumexp(-1).detach())
    for actual, truth in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(actual, truth)


def test_the_efficient_kernels_padding_holds_no_queries(monkeypatch):
    """Its log-sum-exp has a multiple of 32 rows: those beyond the last query weigh nothing, exp(s - inf)."""
    given = {}
    monkeypatch.setattr(
        sdpa.aten,
        "_scaled_dot_product_efficient_attention_backward",
        lambda *args, **kwargs: given.update(lse=args[6]) or (None,) * 4,
    )
    q = torch.zeros(1, 1, 33, 8)
    sdpa._efficient_backward(q, q, q, q, q, torch.zeros(1, 1, 33), 1.0)
    assert given["lse"].shape == (1, 1, 64)
    assert given["lse"][..., :33].eq(0).all()
    assert given["lse"][..., 33:].isposinf().all()
