"""Linears of int8 and float8 operands in the interpreter: torch's GEMM with the epilogue's kernel, and the own GEMM."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from internvit import numerics, ops
from internvit.ops.core.quant_math import E4M3
from tests.proofs.triton.interpreted.harness import CHANNELS, ROWS, Memory, fits, generator, parametrize, run

BACKENDS = ("triton", "triton_gemm")


@parametrize(
    full=("rows", "channels", "out", "operands", "epilogue"),
    allowed=lambda case: fits(case) and case["rows"] < 1025,
    rows=ROWS,
    channels=CHANNELS,
    out=(1, 72, 136, 300),
    operands=("int8", "int8, zero point", "float8"),
    epilogue=("plain", "bias", "gelu", "residual"),
    dtype=("bfloat16", "float32"),
    backend=BACKENDS,
)
def test_epilogues(case):
    g, memory, dtype = generator(case), Memory(), getattr(torch, case["dtype"])
    rows, K, N = case["rows"], case["channels"], case["out"]
    quantised = E4M3 if case["operands"] == "float8" else torch.int8
    x = numerics.sample((1, rows, K), "massive", torch.float32, g)
    x_q, x_scale, x_zero = ops.per_token_quant(x, symmetric="zero" not in case["operands"], dtype=quantised)
    weight_q, weight_scale, _ = ops.per_token_quant(torch.randn(N, K, generator=g) * K**-0.5, dtype=quantised)
    bias = None if case["epilogue"] == "plain" else memory.place(torch.randn(N, generator=g))
    residual = memory.place(torch.randn(1, rows, N, generator=g).to(dtype)) if case["epilogue"] == "residual" else None
    gelu = case["epilogue"] == "gelu"
    zero = (x_zero if "zero" in case["operands"] else None,) if quantised == torch.int8 else ()
    op = "linear_int8" if quantised == torch.int8 else "linear_fp8"
    args = (x_q, x_scale, weight_q, weight_scale, bias, *zero, residual, gelu, dtype)
    (y,) = run(memory, op, *args, backend=case["backend"])
    centred = x_q.double() - (x_zero.unsqueeze(-1) if zero and zero[0] is not None else 0)
    product = F.linear(centred, weight_q.double()) * x_scale.double().unsqueeze(-1) * weight_scale.double()
    z = product + sum(t.double() for t in (bias, residual) if t is not None)
    terms = F.linear(centred.abs(), weight_q.double().abs()) * x_scale.double().unsqueeze(-1) * weight_scale.double()
    truth = F.gelu(z) if gelu else z
    # int8 sums are exact, float8's are of K products in float32; then a few roundings, and that of y.
    arithmetic = (terms * K**0.5 if quantised == E4M3 else product.abs()) + z.abs() + (z - product).abs()
    allowed = 8 * torch.finfo(torch.float32).eps * arithmetic + 0.51 * torch.finfo(dtype).eps * truth.abs()
    assert ((y.double() - truth).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [ops.linear_int8, ops.linear_fp8])
def test_batches_and_no_rows(op, backend):
    dtype = torch.int8 if op is ops.linear_int8 else E4M3
    x_q, x_scale, _ = ops.per_token_quant(torch.randn(3, 50, 96), dtype=dtype)
    weight_q, weight_scale, _ = ops.per_token_quant(torch.randn(136, 96), dtype=dtype)

    def run_on(images: slice) -> Tensor:
        return op(x_q[images], x_scale[images], weight_q, weight_scale, backend=backend)

    whole = run_on(slice(None))
    assert all(torch.equal(whole[i], run_on(slice(i, i + 1))[0]) for i in range(3))
    assert run_on(slice(0, 0)).shape == (0, 50, 136)
