"""Mends Triton's interpreter where it computes other bits than a GPU does, so that kernels need no workaround.

* float32 -> bfloat16 truncates (half of all values come out one ulp off); a GPU rounds to nearest even.
* `tl.dot` multiplies the raw 16-bit patterns of bfloat16 operands as integers.
* After each launch every storage is copied onto itself, for tensors on the CPU too: gigabytes where a stride is large.

`test_interpreter.py` fails on the day Triton mends either, and then this file goes.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

triton_convert_float = interpreter._convert_float
triton_create_dot = interpreter.InterpreterBuilder.create_dot


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 x rounded to the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _convert_float(data, input_dtype, output_dtype, rounding_mode):
    if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
        return round_to_bfloat16(data).reshape(data.shape)
    if input_dtype == tl.bfloat16 and output_dtype == tl.float32:
        return data.astype(np.uint32) << 16  # the same bits as Triton's, at a tenth of the time
    return triton_convert_float(data, input_dtype, output_dtype, rounding_mode)


def _widened(operand: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _create_dot(self, a, b, d, *rest):
    return triton_create_dot(self, _widened(a), _widened(b), d, *rest)


def _restore_args_dev(self, args_dev, args_hst, kwargs, kwargs_hst):
    """Nothing: tests/ has tensors on the CPU alone, which the interpreter works on in place."""


def mend() -> None:
    """Replaces the functions for this process."""
    interpreter.GridExecutor._restore_args_dev = _restore_args_dev
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
