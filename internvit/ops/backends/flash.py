"""Backend `flash`: attention by the flash-attn package (2.x), dense, on strided views of a packed qkv buffer.

Upstream unbinds, normalises, stacks qkv again and calls the variable-length kernel even for a dense batch; the dense
kernel takes q, k and v by strides, so none of these copies is made. Written against flash-attn 2.8's recorded
signatures and never run on a GPU: unmeasured.
"""

from typing import Any

from torch import Tensor

from internvit.ops.attention import Heads, QKNorm, SavedAttention
from internvit.ops.backends.registry import implements

_NO_WINDOW = -1
_NO_SOFTCAP = 0.0


def _interface() -> Any:
    from flash_attn import flash_attn_interface

    return flash_attn_interface


@implements("attention", "flash")
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None = None) -> tuple[Tensor, Tensor]:
    out, lse, _, _ = _interface()._flash_attn_forward(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=_NO_WINDOW,
        window_size_right=_NO_WINDOW,
        softcap=_NO_SOFTCAP,
        alibi_slopes=None,
        return_softmax=False,
    )
    return out, lse


@implements("attention_backward", "flash")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, out, lse, scale, _ = saved
    _interface()._flash_attn_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        *grads,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
        window_size_left=_NO_WINDOW,
        window_size_right=_NO_WINDOW,
        softcap=_NO_SOFTCAP,
        alibi_slopes=None,
        deterministic=True,
    )
