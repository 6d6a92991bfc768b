"""Calls what runs an op on a backend with the arguments of the op's schema."""

from typing import Any

from internvit.ops.attention import QKNorm, SavedAttention
from internvit.ops.backends.registry import implementation
from internvit.ops.core.registration import fill_gradients


def call(op: str, backend: str, *args: Any) -> Any:
    """Runs `op` on arguments as in its schema; attention's backward takes grad_q, grad_k, grad_v last."""
    function = implementation(op, backend)
    if op == "attention":
        return function(*args[:4], None if args[4] is None else QKNorm(*args[4:]))
    if op == "attention_backward":
        grad_out, *saved = args[:7]
        qk_norm = None if args[7] is None else QKNorm(*args[7:11])
        grads = function(grad_out, SavedAttention(*saved, qk_norm), args[11:])
        return fill_gradients((None,) * 4, grad_out) if grads is None else tuple(grads)
    outputs = function(*args)
    if isinstance(outputs, tuple) and any(o is None for o in outputs):
        return fill_gradients(outputs, args[0])
    return outputs
