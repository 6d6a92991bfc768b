"""Starts kernels that Triton's JIT has compiled for an earlier launch, without asking the JIT again.

The JIT binds, specialises and formats its key anew at each launch: 8 us for the norm's 19 arguments, 12 for attention's
30. Here the key is what the JIT can see of a launch, and more: a tensor's dtype and the last bits of its address, the
value of an integer that is specialised, the type of a float or None, the constants, and the device. So each kernel that
the JIT would choose has a key, or several. What the JIT reads of its environment, as TRITON_DEBUG, is that of the first
such launch.

AMD's compiler also looks at the size of a tensor's storage: there the JIT starts every kernel, as it does one with an
argument of another kind.
"""

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from triton.compiler import CompiledKernel
from triton.runtime import driver

_MOST_LAUNCHES = 4096
_INT32 = range(-(1 << 31), 1 << 31)

_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
"""Key of a launch -> the compiled kernel, and the constants as its last arguments."""


def options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """What a kernel is compiled with. A product and the sum after it may round once, as Triton did without being asked
    up to 3.9; 3.10 is to round twice (its announcement), with other bits and more instructions."""
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}


def start(
    kernel: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
    warmup: bool = False,
) -> Any:
    """`kernel[grid](*args, **constants, **options(...))`; with `warmup` all but the start itself.

    Returns the compiled kernel, None in the interpreter.
    """
    key = key_of(kernel, args, constants, num_warps, num_stages)
    known = _compiled.get(key) if key is not None else None
    if known is None:
        compiled = kernel.run(*args, grid=grid, warmup=warmup, **options(num_warps, num_stages), **constants)
        if key is not None and isinstance(compiled, CompiledKernel):  # a hook may have kept it from compiling
            _remember(key, kernel, compiled, args, constants)
        return compiled
    compiled, last = known
    if not warmup:
        compiled[grid if len(grid) == 3 else (*grid, 1, 1)](*args, *last)
    return compiled


def key_of(
    kernel: Any, args: tuple[Any, ...], constants: dict[str, Any], num_warps: int, num_stages: int
) -> tuple[Any, ...] | None:
    """What determines the compiled kernel; None where the JIT has to choose, or a hook wants to see the launch."""
    if type(kernel) is not triton.JITFunction or torch.version.hip is not None or kernel.pre_run_hooks:
        return None
    key: list[Any] = []
    low_bits: list[int] = []
    for a in args:
        kind = type(a)
        if kind is Tensor or kind is Parameter:
            key.append(a.dtype)
            low_bits.append(a.data_ptr() & 15)
        elif kind is int:
            key.append(a)
        elif kind is float or a is None:
            key.append(kind)
        else:
            return None
    for i in _unspecialized(kernel.fn, *kernel.do_not_specialize):
        if key[i] not in _INT32:
            return None
        key[i] = None
    device = driver.active.get_current_device()
    return kernel.fn, device, num_warps, num_stages, *constants, *constants.values(), *low_bits, *key


@functools.cache
def _unspecialized(function: Any, *names: str) -> tuple[int, ...]:
    """Positions of `function`'s parameters `names`."""
    return tuple(map(function.__code__.co_varnames.index, names))


def _remember(
    key: tuple[Any, ...], kernel: Any, compiled: Any, args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    last = kernel.arg_names[len(args) :]
    if constants.keys() != set(last) or compiled.metadata.target.backend != "cuda":
        return
    if len(_compiled) >= _MOST_LAUNCHES:
        _compiled.clear()
    _compiled[key] = compiled, tuple(constants[name] for name in last)
