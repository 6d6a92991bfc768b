"""Mends Triton's interpreter where it computes other bits than a GPU does, so that kernels need no workaround.

* float32 -> bfloat16 truncates (half of all values come out one ulp off); a GPU rounds to nearest even.
* `tl.rsqrt` knows denormal numbers; on NVIDIA it compiles to rsqrt.approx.ftz, which takes them for 0.
* `tl.dot` multiplies the raw 16-bit patterns of bfloat16 operands as integers.
* After each launch every storage is copied onto itself, for tensors on the CPU too: gigabytes where a stride is large.
* Each call of a device function replaces `triton.language` anew, as its launch did before: half of all time.
* Whether a sum, difference or product of integers overflows is computed by ten ops in int64, 40 % of all time, and then
  told nobody unless the launch has `debug`. Here it is an error.
* The shape of each block's type is validated and printed anew for every op, a fifth of what is left; so are the
  sizes of each tensor, and equal shapes are compared one size at a time, together a tenth of what is left then.

`test_interpreter.py` fails on the day Triton mends any of these, and then this file goes.
"""

import functools
import math
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

triton_convert_float = interpreter._convert_float
triton_create_dot = interpreter.InterpreterBuilder.create_dot
triton_create_rsqrt = interpreter.InterpreterBuilder.create_rsqrt
triton_patch_lang = interpreter._patch_lang
triton_get_np_dtype = interpreter._get_np_dtype
triton_init_block_type = tl.block_type.__init__
triton_broadcast = TritonSemantic.broadcast_impl_value
triton_refuse_overflow = TritonSemantic.binary_op_sanitize_overflow_impl
_scalar_np_dtype = functools.cache(triton_get_np_dtype)  # Triton builds a table of all dtypes at each call
_block_types: dict[Any, dict[str, Any]] = {}  # the attributes of each
_patched: set[int] = set()  # of the launch that runs: the globals of modules whose functions were called


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


def _create_rsqrt(self, arg):
    flushed = np.where(np.abs(arg.data) < np.finfo(np.float32).tiny, np.float32(0), arg.data)
    return triton_create_rsqrt(self, interpreter.TensorHandle(flushed, arg.dtype))


def _restore_args_dev(self, args_dev, args_hst, kwargs, kwargs_hst):
    """Nothing: tests/ has tensors on the CPU alone, which the interpreter works on in place."""


def _patch_lang(fn):
    """Once a launch for the functions of one module, until the launch's scope is restored."""
    if id(fn.__globals__) in _patched:
        return interpreter._LangPatchScope()
    first, scope = not _patched, triton_patch_lang(fn)
    _patched.add(id(fn.__globals__))
    if first:  # the launch's own; those of device functions are never restored, and need not be
        restore = scope.restore
        scope.restore = lambda: (_patched.clear(), restore())
    return scope


def _get_np_dtype(dtype):
    return _scalar_np_dtype(dtype) if type(dtype) is tl.dtype else triton_get_np_dtype(dtype)


def _init_block_type(self, element_ty, shape):
    key: Any = element_ty
    if type(element_ty) is tl.pointer_type:  # pointers have no hash
        key = element_ty.element_ty, element_ty.address_space, element_ty.const
    shape = tuple([s.value if isinstance(s, tl.constexpr) else s for s in getattr(shape, "values", shape)])
    if (known := _block_types.get((key, shape))) is None:
        triton_init_block_type(self, element_ty, list(shape))
        _block_types[key, shape] = dict(vars(self))
    else:
        vars(self).update(known)


@functools.cache
def _sizes(shape: tuple[int, ...]) -> tuple[tuple[tl.constexpr, ...], tl.constexpr]:
    return tuple(tl.constexpr(size) for size in shape), tl.constexpr(math.prod(shape))


def _init_tensor(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _sizes(tuple(type.shape.values) if type.is_block() else ())


def _broadcast(self, lhs, rhs):
    left, right = (x.type.shape.values if x.type.is_block() else None for x in (lhs, rhs))
    return (lhs, rhs) if left == right else triton_broadcast(self, lhs, rhs)


_WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _refuse_overflow(self, lhs, rhs, binary_op):
    dtype = lhs.type.scalar
    if dtype.int_bitwidth < 64:
        result = _WIDE[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        if result.min() < dtype.get_int_min_value() or result.max() > dtype.get_int_max_value():
            raise OverflowError(f"{binary_op.__name__} of {dtype}: {result.min()} to {result.max()}")


def mend() -> None:
    """Replaces the functions for this process."""
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow
    TritonSemantic.broadcast_impl_value = _broadcast
    tl.block_type.__init__ = _init_block_type
    tl.tensor.__init__ = _init_tensor
    interpreter._get_np_dtype = _get_np_dtype
    interpreter._patch_lang = _patch_lang
    interpreter.GridExecutor._restore_args_dev = _restore_args_dev
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_rsqrt = _create_rsqrt
    interpreter.InterpreterBuilder.create_dot = _create_dot
