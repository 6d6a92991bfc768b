"""Whether a fused op may stand for a module: only while calling the module does nothing but its class's forward."""

from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.nn.modules import module as nn_module


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def has_global_hooks() -> bool:
    """Whether the calls of all modules do more than their classes' forward."""
    return bool(
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    )


def is_plain(module: nn.Module, module_class: type) -> bool:
    """Whether `module` is exactly a `module_class`, without hooks or a tensor subclass as its weight."""
    return type(module) is module_class and not has_hooks(module) and _is_plain_tensor(module.weight)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is an `nn.Linear` without hooks, adapters, parametrisation or a tensor subclass inside."""
    return is_plain(module, nn.Linear)


def is_unhooked_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether `module` is an `nn.Linear` without hooks, adapters or parametrisation; its weight may be a subclass."""
    return type(module) is nn.Linear and not has_hooks(module)


def _is_plain_tensor(t: Any) -> bool:
    return type(t) in (nn.Parameter, Tensor)
