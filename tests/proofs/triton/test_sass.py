"""Cycles of a main loop from its disassembly."""

import pytest

from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools.sass import LoopCost, loop_cost, loops


def code(*instructions):
    return "\n".join(
        f"        /*{i:04x}*/                   {text} ;" if not text.startswith(".L") else f"{text}:"
        for i, text in enumerate(instructions)
    )


WGMMA = code(
    "MOV R1, c[0x0][0x28]",
    ".L_x_1",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT",
    "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24",
    "MUFU.EX2 R2, R2",
    "@P0 BRA `(.L_x_1)",
    ".L_x_2",
    "FADD R3, R3, R2",
    "@P1 BRA `(.L_x_2)",
    "BRA `(.L_x_9)",
)


def test_loops_end_in_a_branch_back():
    assert [len(loop) for loop in loops(WGMMA)] == [4, 2]


def test_cost_of_the_loop_with_most_products():
    """8 warps are two groups: each instruction 2 * 64 * 64 * 16 flops, in tiles of 128 x 64 scores of 16 terms."""
    cost = loop_cost(WGMMA, TARGETS["sm_90"], warps=8, tile=128 * 64, products=2, head_dim=16)
    assert cost == LoopCost(issue=4, tensor=64, exp=8, products=1.0)


def test_products_that_warps_share_count_once_for_each():
    """A tile of 64 rows gives two groups the same products: twice those needed."""
    cost = loop_cost(WGMMA, TARGETS["sm_90"], warps=8, tile=64 * 64, products=2, head_dim=16)
    assert cost.products == 2.0


def test_mma_counts_each_warp():
    mma = code(".L_x_1", *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 64, "@P0 BRA `(.L_x_1)")
    cost = loop_cost(mma, TARGETS["sm_80"], warps=4, tile=64 * 64, products=1, head_dim=128)
    assert cost == LoopCost(issue=65, tensor=512, exp=0, products=1.0)


@pytest.mark.parametrize("arch", ["sm_100", "gfx942"])
def test_no_shape_no_figure(arch):
    assert loop_cost(WGMMA, TARGETS[arch], 8, 64 * 64, 2, 64) is None
