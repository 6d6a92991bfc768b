"""Which Linears of a model `optimize_for_inference` computes in int8 or float8."""

import fnmatch
import logging
from collections.abc import Collection, Iterable

import torch
from torch import nn

from internvit.inference import fp8, linear_int8
from internvit.inference.int8_grid import is_on_grid
from internvit.inference.packed_block import LINEARS
from internvit.model.hooks import has_own_hooks
from internvit.model.vit import InternViT

logger = logging.getLogger("internvit")

PRECISIONS = ("bf16", "int8", "fp8")


def quantised_linears(model: InternViT, precision: str | None, skip: Iterable[str] | None) -> frozenset[str]:
    """The names of the Linears to compute in int8 or float8: all of the blocks' but those that `skip` names.

    By default those whose weights are int8 values already, as `calibrate` leaves them and an int8 checkpoint has them.
    Where there are none, those of the first and the last block are left out. They make 43 % of the squared error of a
    trained ViT-S with 12 blocks: its tokens err by 1.8 to 2.6 % without them, by 2.6 to 3.7 % with them (three
    photographs).

    Raises:
        ValueError: another precision, a model of another dtype or device, or a name in skip that no Linear has.
    """
    op = "optimize_for_inference"
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be None, {', '.join(map(repr, PRECISIONS))}, got {precision!r}")
    if isinstance(skip, str):
        raise ValueError(f"{op}: skip must be a list of names, got the string {skip!r}")
    names = [f"encoder.layers.{i}.{name}" for i in range(len(model.encoder.layers)) for name in LINEARS]
    skipped = None if skip is None else _named(op, names, skip)  # a name that none has is wrong for any precision
    if precision is None:
        return frozenset()
    if model.dtype != torch.bfloat16:
        raise ValueError(
            f"{op}: precision={precision!r} needs a bfloat16 model, got {model.dtype}; call model.bfloat16()"
        )
    if precision == "bf16":
        return frozenset()
    _check_device(op, model, precision)
    if skipped is not None:
        return frozenset(names) - skipped
    on_grid = frozenset[str]()
    if precision == "int8":
        on_grid = frozenset(name for name in names if _has_int8_weight(model.get_submodule(name)))
    first_and_last = {f"encoder.layers.{i}" for i in (0, len(model.encoder.layers) - 1) if i >= 0}
    return on_grid or frozenset(names) - _named(op, names, first_and_last)


def _check_device(op: str, model: InternViT, precision: str) -> None:
    """int8 is for CPUs, and bfloat16 stands in where one lacks it; float8 is for GPUs."""
    if precision == "fp8":
        reason = fp8.unavailable_reason(model.device)
        if reason is not None:
            raise ValueError(f"{op}: precision='fp8' needs a model on {reason}")
        return
    if model.device.type != "cpu":
        raise ValueError(f"{op}: precision='int8' needs a model on a CPU, got {model.device}")
    reason = linear_int8.unavailable_reason()
    if reason is not None:
        logger.warning("%s: the Linears stay bfloat16: %s", op, reason)


def _has_int8_weight(linear: nn.Module) -> bool:
    # Hooks of all modules do not change what a checkpoint holds.
    if type(linear) is not nn.Linear or has_own_hooks(linear):
        return False
    return type(linear.weight) is nn.Parameter and is_on_grid(linear.weight)


def _named(op: str, names: Collection[str], patterns: Iterable[str]) -> frozenset[str]:
    """The names that a pattern matches, as they are or by one of the modules that they lie in."""
    named: set[str] = set()
    for pattern in patterns:
        matched = {name for name in names if any(fnmatch.fnmatchcase(part, pattern) for part in _parents(name))}
        if not matched:
            raise ValueError(
                f"{op}: skip must name Linears of the blocks, such as 'encoder.layers.0' or '*.mlp.fc2', got "
                f"{pattern!r}, which names none"
            )
        named |= matched
    return frozenset(named)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
