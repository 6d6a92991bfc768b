"""How often a block goes through memory is held to a committed number: speed without a clock."""

import json

import pytest
import torch
from torch.nn import functional as F

from internvit.benchmarks.harness.cases import BOTH, FORWARD
from internvit.benchmarks.reports import memory_passes as passes
from internvit.inference.linear import onednn_packs

COMMITTED = json.loads(passes.BUDGET.read_text())
CASES = [(where, way) for where, row in COMMITTED.items() for way in row if way.startswith("internvit")]


@pytest.mark.parametrize(("where", "way"), CASES, ids=[f"{where} {way}" for where, way in CASES])
def test_no_block_goes_through_memory_more_often(where: str, way: str) -> None:
    name, mode = where.split()
    packed = way.endswith(", packed")
    if packed and not onednn_packs():
        pytest.skip("oneDNN packs no bfloat16 weights on this machine")
    dtype = torch.bfloat16 if packed else torch.float32
    width = passes.InternViTConfig.from_name(name).hidden_size
    counted = passes.units(passes.blocks(name, dtype)[way](), width, dtype, mode)
    allowed = COMMITTED[where][way]
    assert counted <= allowed + 0.005, f"{way}, {where}: {counted:.2f} passes of one [N, C] tensor, budget {allowed}"


def test_counts_of_known_chains() -> None:
    weight = torch.ones(8)
    assert passes.units(lambda x: x + 1, 8, torch.float32, FORWARD) == 2
    assert passes.units(lambda x: x.transpose(0, 1).unflatten(-1, (2, 4)), 8, torch.float32, FORWARD) == 0
    assert passes.units(lambda x: (x + x) * weight, 8, torch.float32, FORWARD) == 4
    assert passes.units(lambda x: F.linear(x, torch.ones(32, 8)), 8, torch.float32, FORWARD) == 5
    assert passes.units(lambda x: x.clone().add_(1), 8, torch.float32, FORWARD) == 4
    assert passes.units(lambda x: x * 2, 8, torch.float32, BOTH) == 2 + 2
    # Backward: two products of the incoming gradient with x, and their sum.
    assert passes.units(lambda x: x * x, 8, torch.float32, BOTH) == 2 + 2 * 3 + 3


def test_a_wasted_pass_is_seen() -> None:
    name, way = "internvit-300m-448px", "internvit InternViT"
    block = passes.blocks(name)[way]()
    wasteful = passes.units(lambda x: block(x.clone()), 1024, torch.float32, FORWARD)
    assert wasteful == pytest.approx(COMMITTED[f"{name} {FORWARD}"][way] + 2, abs=0.01)


def test_the_page_says_what_is_counted() -> None:
    page = (passes.BUDGET.resolve().parents[2] / "docs" / "benchmarks.md").read_text()
    assert passes.table(COMMITTED) in page
