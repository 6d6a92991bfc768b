"""What an iteration of an attention kernel's main loop costs each unit of a multiprocessor, read from machine code.

Figures are of disassembly, never measured: cycles of one multiprocessor for 64 x 64 scores, as if each unit had nothing
else to wait for. The longest is a bound from below; units that the code does not overlap add up.
"""

import math
import re
from dataclasses import dataclass

from internvit.kernels.common.target import Target

_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_x_\d+)\)")
_PRODUCT = re.compile(r"\b(?:[HIQ]GMMA\.(\d+)x(\d+)x(\d+)|[HIQ]MMA\.(16)(8)(32|16|8))\b")
_TENSOR_FLOPS = {"sm_80": 2048, "sm_86": 1024, "sm_89": 1024, "sm_90": 4096, "sm_120": 512}
"""Dense bfloat16 flops of a multiprocessor a cycle: the rates of `roofline.CEILINGS` over multiprocessors and clock;
those of int8 and float8 are twice as many."""
_ONE_BYTE = re.compile(r"\b[IQ]G?MMA\b")
_EXPONENTIALS = 16
"""A multiprocessor evaluates a cycle."""
SCORES = 64 * 64


@dataclass(frozen=True)
class LoopCost:
    """For 64 x 64 scores.

    Attributes:
        issue, tensor, exp: cycles of the schedulers, the tensor cores and the special function units.
        products: flops issued to tensor cores over those that the formula needs.
    """

    issue: float
    tensor: float
    exp: float
    products: float


def loops(sass: str) -> list[list[str]]:
    """The instructions of each loop: from a label to a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    found = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1].strip())
            branch = _BRANCH.search(instruction[1])
            if branch and branch[1] in labels:
                found.append(instructions[labels[branch[1]] :])
    return found


def _flops(loop: list[str], warps: int) -> int:
    """Of a program's matrix products in one iteration: a wgmma is of four warps, an mma of one."""
    total = 0
    for instruction in loop:
        if product := _PRODUCT.search(instruction):
            shape = [int(size) for size in product.groups() if size]
            total += 2 * math.prod(shape) * (warps // 4 if product[1] else warps)
    return total


def loop_cost(sass: str, target: Target, warps: int, tile: int, products: int, head_dim: int) -> LoopCost | None:
    """Of the loop with most matrix products; None where there is none, or the target's products name no shape.

    Args:
        warps: of the program.
        tile: scores of one iteration.
        products: over all scores that the kernel has to compute, of head_dim terms each.
    """
    main = max(loops(sass), key=lambda loop: _flops(loop, warps), default=[])
    flops, share = _flops(main, warps), SCORES / tile
    if not flops or target.name not in _TENSOR_FLOPS:
        return None
    rate = _TENSOR_FLOPS[target.name] * (2 if any(map(_ONE_BYTE.search, main)) else 1)
    exponentials = sum("MUFU.EX2" in instruction for instruction in main) * warps * 32
    return LoopCost(
        issue=round(len(main) * warps / 4 * share),
        tensor=round(flops / rate * share),
        exp=round(exponentials / _EXPONENTIALS * share),
        products=round(flops * share / (2 * products * SCORES * head_dim), 3),
    )
