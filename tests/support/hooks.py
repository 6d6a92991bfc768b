"""What a user hangs on a module after it was optimised."""

from torch import nn

KINDS = ("hook", "pre-hook", "forward")


def count_calls(module: nn.Module, kind: str) -> list[int]:
    """A list that grows with each call of `module`, counted by a forward hook, a pre-hook, or a forward of its own."""
    calls: list[int] = []
    if kind == "forward":
        own = module.forward
        module.forward = lambda *args, **kwargs: calls.append(1) or own(*args, **kwargs)
    else:
        register = module.register_forward_hook if kind == "hook" else module.register_forward_pre_hook
        register(lambda *_: calls.append(1))
    return calls
