"""Backend `flash`: attention by the flash-attn package (2.x), dense, on strided views of a packed qkv buffer.

Upstream unbinds, normalises, stacks qkv again and calls the variable-length kernel even for a dense batch; the dense
kernel takes q, k and v by strides, so none of these copies is made. Written against flash-attn 2.8's recorded
signatures and never run on a GPU: unmeasured.
"""

from typing import Any

from torch import Tensor

from internvit.ops.attention import Heads, QKNorm, SavedAttention
from internvit.ops.backends.registry import implements

_DENSE = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
"""Attention without dropout, mask, window, softcap or position bias."""


def _interface() -> Any:
    from flash_attn import flash_attn_interface

    return flash_attn_interface


@implements("attention", "flash")
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None = None) -> tuple[Tensor, Tensor]:
    out, lse, _, _ = _interface()._flash_attn_forward(q, k, v, softmax_scale=scale, return_softmax=False, **_DENSE)
    return out, lse


@implements("attention_backward", "flash")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, out, lse, scale, _ = saved
    _interface()._flash_attn_backward(
        grad_out, q, k, v, out, lse, *grads, softmax_scale=scale, deterministic=True, **_DENSE
    )
