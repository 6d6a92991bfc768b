"""Backend `flash`: attention by the best flash attention that is installed and made for the card, dense or packed.

The first of `LIBRARIES` that fits is taken: flash-attn 3 on Hopper, flash-attn 4 on Hopper and Blackwell, flash-attn 2
on any card from 8.0 on, and cuDNN's kernels, which torch brings. cuDNN comes last because its backward is not
deterministic; the others are asked to be. All give the log-sum-exp [B, H, N] in float32 that their backward takes.
Packed sequences go through the variable-length functions of flash-attn 2, 3 and 4, whose log-sum-exp is [H, total];
cuDNN has none here.

Upstream unbinds, normalises, stacks qkv again and calls the variable-length kernel even for a dense batch; the dense
kernels take q, k and v by strides, so none of these copies is made. Written against recorded signatures and never run
on a GPU: unmeasured, the order too. Source: Dao-AILab/flash-attention at 0251105a, flash_attn/flash_attn_interface.py,
hopper/flash_attn_interface.py and flash_attn/cute/interface.py; `aten` of torch 2.14.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvit.ops.backends import sdpa
from internvit.ops.backends.registry import implements
from internvit.ops.core.attention_math import Heads, QKNorm, SavedAttention
from internvit.ops.core.fallback import KernelStartError
from internvit.ops.core.sequences import Sequences


@dataclass(frozen=True)
class FlashLibrary:
    """How one library is called.

    Attributes:
        module: has its functions.
        majors: compute capabilities that it is taken on.
        max_head_dim: the largest head dimension; all take multiples of 8.
        forward: (module, q, k, v, scale, sequences) -> out, lse.
        backward: (module, grad_out, saved, grads): fills grads.
        deterministic: whether backward gives the same bits each time.
        varlen: whether it takes packed sequences.
    """

    name: str
    module: str
    majors: tuple[int, ...]
    max_head_dim: int
    forward: Callable[[Any, Tensor, Tensor, Tensor, float, Sequences | None], tuple[Tensor, Tensor]]
    backward: Callable[[Any, Tensor, SavedAttention, Heads], None]
    deterministic: bool = True
    varlen: bool = True

    def installed(self) -> bool:
        """Whether its module is there; it is not imported."""
        if self is CUDNN:
            return torch.cuda.is_available() and torch.backends.cudnn.is_available()
        top, *rest = self.module.split(".")
        spec = importlib.util.find_spec(top)
        if spec is None or not rest:
            return spec is not None
        folders = spec.submodule_search_locations or ()
        return any(Path(folder, *rest).with_suffix(".py").exists() for folder in folders)

    def takes(self, major: int, head_dim: int) -> bool:
        return major in self.majors and head_dim % 8 == 0 and head_dim <= self.max_head_dim


_UNMASKED_2 = {
    "dropout_p": 0.0,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
}
"""Attention without dropout, mask, window, softcap or position bias."""


def _packed(sequences: Sequences | None) -> dict[str, Any]:
    """The arguments that say where sequences begin and end; none of a dense batch."""
    if sequences is None:
        return {}
    ends, keys = sequences.cu_seqlens.contiguous(), sequences.keys
    ends_k = ends if keys is sequences else keys.cu_seqlens.contiguous()
    longest = {"max_seqlen_q": sequences.max_seqlen, "max_seqlen_k": keys.max_seqlen}
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends_k, **longest}


def _forward_2(
    library: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences | None
) -> tuple[Tensor, Tensor]:
    forward = library._flash_attn_forward if sequences is None else library._flash_attn_varlen_forward
    settings = {"softmax_scale": scale, "return_softmax": False, **_UNMASKED_2}
    out, lse, _, _ = forward(q, k, v, **_packed(sequences), **settings)
    return out, lse


def _backward_2(library: Any, grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, out, lse, scale, _, sequences = saved
    backward = library._flash_attn_backward if sequences is None else library._flash_attn_varlen_backward
    settings = {"softmax_scale": scale, "deterministic": True, **_UNMASKED_2}
    backward(grad_out, q, k, v, out, lse, *grads, **_packed(sequences), **settings)


def _forward_3(
    library: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences | None
) -> tuple[Tensor, Tensor]:
    out, lse, _, _ = library._flash_attn_forward(q, k, v, softmax_scale=scale, causal=False, **_packed(sequences))
    return out, lse


def _backward_3(library: Any, grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, out, lse, scale, _, sequences = saved
    dq, dk, dv = grads
    settings = {"softmax_scale": scale, "is_causal": False, "deterministic": True, **_packed(sequences)}
    library._flash_attn_backward(grad_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **settings)


def _forward_4(
    library: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences | None
) -> tuple[Tensor, Tensor]:
    settings = {"softmax_scale": scale, "causal": False, "return_lse": True, **_packed(sequences)}
    out, lse, _, _ = library._flash_attn_fwd(q, k, v, **settings)
    return out, lse


def _backward_4(library: Any, grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, k, v, out, lse, scale, _, sequences = saved
    settings = {"softmax_scale": scale, "causal": False, "deterministic": True, **_packed(sequences)}
    results = library._flash_attn_bwd(q, k, v, out, grad_out, lse, **settings)
    for destination, grad in zip(grads, results, strict=True):  # it makes contiguous gradients of its own
        destination.copy_(grad)


def _forward_cudnn(
    library: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    out, lse = sdpa._cudnn(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _backward_cudnn(library: Any, grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    grad, q, k, v, out = (t.transpose(1, 2) for t in (grad_out, saved.q, saved.k, saved.v, saved.out))
    results = sdpa._cudnn_backward(grad, q, k, v, out, saved.lse, saved.scale)
    for destination, grad in zip(grads, results, strict=True):
        destination.copy_(grad.transpose(1, 2))


CUDNN = FlashLibrary("cuDNN", "torch", (9, 10), 128, _forward_cudnn, _backward_cudnn, False, varlen=False)
LIBRARIES = (
    FlashLibrary("flash-attn 3", "flash_attn_interface", (9,), 256, _forward_3, _backward_3),
    FlashLibrary("flash-attn 4", "flash_attn.cute.interface", (9, 10, 11), 128, _forward_4, _backward_4),
    FlashLibrary("flash-attn 2", "flash_attn.flash_attn_interface", (8, 9, 10, 11, 12), 256, _forward_2, _backward_2),
    CUDNN,
)
"""In order of preference."""


def unavailable_reason() -> str | None:
    """Why no library can be called here; None where one can."""
    if any(library.installed() for library in LIBRARIES):
        return None
    return (
        "none of flash-attn 2, 3 and 4 is installed and torch has no cuDNN: pip install 'internvit[flash]' on a "
        "machine with an NVIDIA GPU"
    )


def unsupported_reason(device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why no installed library takes such tensors on every visible GPU; None where one does."""
    if device != "cuda":
        return f"it runs on cuda tensors, got {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16, float16, got {dtype}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(max(count, 1)):
        major = _major(index)
        if _library(major, head_dim) is None:
            names = ", ".join(library.name for library in LIBRARIES if library.installed())
            return f"of what is installed ({names}), none takes compute capability {major}.x and head_dim {head_dim}"
    return None


def varlen_unsupported_reason() -> str | None:
    """Why no installed library takes packed sequences on every visible GPU; None where one does."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for major in map(_major, range(max(count, 1))):
        if _library(major, 8, varlen=True) is None:
            return (
                f"no flash-attn 2, 3 or 4 for compute capability {major}.x is installed, and cuDNN takes no cu_seqlens "
                "here"
            )
    return None


def _major(index: int | None) -> int:
    """The card's compute capability; 8 for fake tensors without a card, and on ROCm, whose flash-attn is version 2."""
    if torch.version.hip or not torch.cuda.is_available():
        return 8
    return torch.cuda.get_device_capability(index)[0]


def library_of(index: int | None, head_dim: int) -> FlashLibrary | None:
    """The library that runs heads of `head_dim` on the card `index`; None where none does."""
    return _library(_major(index), head_dim)


def _library(major: int, head_dim: int, varlen: bool = False) -> FlashLibrary | None:
    fitting = (one for one in LIBRARIES if one.takes(major, head_dim) and (one.varlen or not varlen))
    return next((one for one in fitting if one.installed()), None)


@functools.cache
def _loaded(major: int, head_dim: int, varlen: bool = False) -> tuple[FlashLibrary, Any]:
    library = _library(major, head_dim, varlen)
    if library is None:
        raise RuntimeError(f"flash: no library for compute capability {major}.x and head_dim {head_dim} is installed")
    try:
        return library, importlib.import_module(library.module)
    except (ImportError, OSError) as error:  # built for another torch or CUDA
        raise KernelStartError(f"flash: {library.name} is installed and cannot be imported: {error}") from error


@implements("attention", "flash")
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, qk_norm: QKNorm | None = None, sequences: Sequences | None = None
) -> tuple[Tensor, Tensor]:
    if sequences is not None and q.shape[0] == 0:  # the libraries take no pack without tokens
        return q.new_empty(q.shape), q.new_empty((q.shape[1], 0), dtype=torch.float32)
    library, module = _loaded(_major(q.device.index), q.shape[-1], sequences is not None)
    return library.forward(module, q, k, v, scale, sequences)


@implements("attention_backward", "flash")
def attention_backward(grad_out: Tensor, saved: SavedAttention, grads: Heads) -> None:
    q, sequences = saved.q, saved.sequences
    if sequences is not None and q.shape[0] == 0:
        return
    library, module = _loaded(_major(q.device.index), q.shape[-1], sequences is not None)
    library.backward(module, grad_out, saved, grads)
