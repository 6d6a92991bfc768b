"""What a module leaves for backward, counted by the storages that are alive, not by what hooks report."""

import gc
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorages(TorchDispatchMode):
    """The storages that ops made while active and that something still holds, a module's parameters apart."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage()._cdata for p in module.parameters()}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata in self.parameters:
                    continue
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def bytes(self) -> int:
        gc.collect()
        return sum(n for reference, n in self.made.values() if not reference.expired())


def saved_units(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor] | None = None) -> float:
    """Units of one [N, C] tensor alive between forward and backward, the input counted, the output not."""
    with LiveStorages(module) as live:
        x.view_as(x)  # so that the input is counted
        y = (call or module)(x)
    assert y.requires_grad
    unit = x.numel() * x.element_size()
    return (live.bytes() - y.numel() * y.element_size()) / unit
