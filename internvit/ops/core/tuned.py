"""Which backend a tuned file puts before those of `auto`: attention with QK-norm written, by a flash-attention library.

Without QK-norm inside, q_hat and k_hat cost four passes over memory; FlashAttention-3 or cuDNN may win them back at
head_dim 128 on Hopper, where they multiply faster than Triton's kernels. `auto` takes them where they were measured to
be faster: `python -m internvit.kernels.tools.tune` times both on the GPU at hand.
"""

import logging

import torch

from internvit.ops.backends.registry import BACKENDS

logger = logging.getLogger("internvit")

OP = "qk_norm_attention"
"""The op in the file, for separate and packed inputs."""
_CALLERS = (OP, f"{OP}_qkvpacked")


def tuned_backend(caller: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """The backend that was measured to be the fastest for `caller` on every visible GPU; None where none was.

    A measurement of another library than the one that the backend would call now does not count.
    """
    if caller not in _CALLERS or not torch.cuda.is_available() or BACKENDS["triton"].unavailable_reason() is not None:
        return None
    from internvit.kernels.attention.config import tuned_key
    from internvit.kernels.common import config, target
    from internvit.ops.backends import flash

    key, indices = tuned_key(head_dim, dtype), range(torch.cuda.device_count())
    measured = {config.tuned_backend(OP, key, target.target_of_device(index)) for index in indices}
    choice = measured.pop() if len(measured) == 1 else None
    if choice is None or choice.backend != "flash":
        return None
    libraries = {getattr(flash.library_of(index, head_dim), "name", None) for index in indices}
    if libraries != {choice.library}:
        logger.info("%s, %s: %s was measured and is not what would run here", OP, key, choice.library)
        return None
    return choice.backend
