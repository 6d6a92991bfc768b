"""Products of int8 and float8 operands by torch's own GEMMs, for the backends of GPUs.

The sums leave the GEMM in 32 bits, and a pass after it scales them: torch's row-wise scaled GEMM returns bfloat16
alone, before bias, GELU and residual, so that y would be rounded twice. Not run on a GPU yet.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def float8_unavailable_reason(x: Tensor) -> str | None:
    """Why torch multiplies no float8_e4m3fn on x's device; None where it does."""
    if x.device.type != "cuda":
        return f"it runs on cuda tensors, got {x.device.type}"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(x.device).gcnArchName.partition(":")[0]
        return None if name.startswith(("gfx95", "gfx12")) else f"{name} has another float8, float8_e4m3fnuz, or none"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 9):
        return f"it needs compute capability 8.9 or higher, the GPU has {capability[0]}.{capability[1]}"
    return None if hasattr(torch, "_scaled_mm") else "this torch has no torch._scaled_mm"


def padded(x: Tensor, multiple: int, rows: int = 0) -> Tensor:
    """x [M, K] with zeros up to a multiple of columns, and up to `rows` rows."""
    columns, more = -x.shape[1] % multiple, max(0, rows - x.shape[0])
    if not columns and not more:
        return x.contiguous()
    as_bytes = F.pad(x.view(torch.int8), (0, columns, 0, more))
    return as_bytes.view(x.dtype)


def int8_sums(x_q: Tensor, weight_q: Tensor) -> Tensor:
    """x_q weight_q^T [M, N] int32, exact. torch._int_mm takes more than 16 rows, and multiples of 8 columns."""
    rows = x_q.reshape(-1, x_q.shape[-1])
    if x_q.device.type == "cpu":
        return torch._int_mm(rows.contiguous(), weight_q.t().contiguous())
    weight = padded(weight_q, 8, weight_q.shape[0] + -weight_q.shape[0] % 8)
    sums = torch._int_mm(padded(rows, 8, 17), weight.t())
    return sums[: rows.shape[0], : weight_q.shape[0]].contiguous()


def float8_sums(x_q: Tensor, weight_q: Tensor) -> Tensor:
    """x_q weight_q^T [M, N] float32. Where the device has no float8 products, of the operands in bfloat16, which holds
    them exactly: the same sums but for their order, at that GEMM's speed."""
    rows = x_q.reshape(-1, x_q.shape[-1])
    if x_q.device.type != "cuda":
        return rows.float() @ weight_q.float().t()
    if float8_unavailable_reason(x_q) is not None:
        return torch.mm(rows.bfloat16(), weight_q.bfloat16().t(), out_dtype=torch.float32)
    one = torch.ones((), dtype=torch.float32, device=x_q.device)
    weight = padded(weight_q, 16, weight_q.shape[0] + -weight_q.shape[0] % 16)
    sums = torch._scaled_mm(padded(rows, 16), weight.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    return sums[:, : weight_q.shape[0]].contiguous()


def epilogue(
    sums: Tensor,
    x_scale: Tensor,
    weight_q: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    x_zero: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """y [..., N] in plain PyTorch, for a backend without a kernel for it."""
    if x_zero is not None:
        sums = sums - x_zero.reshape(-1, 1) * weight_q.sum(-1, dtype=torch.int32)
    y = sums.float() * x_scale.reshape(-1, 1) * weight_scale
    y = (y if bias is None else y + bias).view(*x_scale.shape, weight_q.shape[0])
    y = y if residual is None else y + residual
    return (F.gelu(y) if gelu else y).to(dtype)
