"""For tests that replace backends: forgets which backend was chosen for which arguments."""

from internvit.ops.core import select
from internvit.ops.core.registration import OPS, PublicOp


def forget_choices() -> None:
    select._resolve_once.cache_clear()
    for op in OPS.values():
        if isinstance(op, PublicOp):
            op.forget_choices()
