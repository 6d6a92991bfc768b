"""Whether a fused op may stand for a module: only while calling the module does nothing but its class's forward."""

from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.nn.modules import module as nn_module

M = TypeVar("M", bound=nn.Module)

# The hooks of FlopCounterMode and CommDebugMode follow which module runs, and read no tensor's value.
_TRACKERS = (
    "torch.utils.module_tracker",
    "torch.distributed._tools.mod_tracker",
    "torch.distributed.tensor.debug._comm_mode",
)

# The forwards of classes that fused ops stand for, as they were written: a program may give a class another one.
_FORWARDS: dict[type, Any] = {}


def fusible_class(module_class: type[M]) -> type[M]:
    """A class decorator: fused ops may stand for the forward that is written in the class."""
    _FORWARDS[module_class] = module_class.forward
    return module_class


def is_written_in(forward: Any, module_class: type) -> bool:
    """Whether a forward was written in the class, by its name."""
    return (forward.__module__, forward.__qualname__) == (
        module_class.__module__,
        f"{module_class.__qualname__}.forward",
    )


for _class in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU, nn.MultiheadAttention):
    _FORWARDS[_class] = _class.forward if is_written_in(_class.forward, _class) else None


def runs_as_written(module: nn.Module, module_class: type[nn.Module]) -> bool:
    """Whether the class of `module` has the forward that was written in `module_class`."""
    return type(module).forward is _FORWARDS[module_class]


def is_exactly(module: nn.Module, module_class: type[M]) -> TypeGuard[M]:
    """Whether `module` is a `module_class`, of no subclass, and calling it is that class's forward and no more."""
    return type(module) is module_class and runs_as_written(module, module_class) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    return has_own_hooks(module) or has_global_hooks()


def has_own_hooks(module: nn.Module) -> bool:
    """`has_hooks`, of hooks that were registered with `module` itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_global_hooks() -> bool:
    """Whether hooks of all modules are registered that want to see each call; `_TRACKERS`' do not."""
    registered: tuple[Mapping[int, Any], ...] = (
        nn_module._global_forward_hooks,
        nn_module._global_forward_pre_hooks,
        nn_module._global_backward_hooks,
        nn_module._global_backward_pre_hooks,
    )
    return any(hooks and any(map(_sees_calls, hooks.values())) for hooks in registered)


def refuse_global_hooks(op: str) -> None:
    """Raises a ValueError while hooks of all modules are registered: no module would be found unmodified."""
    if has_global_hooks():
        raise ValueError(f"{op}: hooks of all modules are registered (register_module_forward_hook); remove them first")


def _sees_calls(hook: Any) -> bool:
    return getattr(hook, "__module__", None) not in _TRACKERS


def is_plain(module: nn.Module, module_class: type[M]) -> TypeGuard[M]:
    """Whether `module` is exactly a `module_class`, without hooks or a tensor subclass as its weight."""
    return is_exactly(module, module_class) and _is_plain_tensor(module.weight)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is an `nn.Linear` without hooks, adapters, parametrisation or a tensor subclass inside."""
    return is_plain(module, nn.Linear)


def is_unhooked_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is an `nn.Linear` without hooks, adapters or parametrisation; its weight may be a subclass."""
    return is_exactly(module, nn.Linear)


def _is_plain_tensor(t: Any) -> bool:
    return type(t) in (nn.Parameter, Tensor)
