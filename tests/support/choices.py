"""For tests that replace backends: forgets which backend was chosen for which arguments."""

from internvit.ops.core import fallback, select
from internvit.ops.core.registration import OPS, PublicOp


def forget_choices() -> None:
    select.forget_resolved()
    fallback.forget_failures()
    for op in OPS.values():
        if isinstance(op, PublicOp):
            op.forget_choices()
