"""The triton backend chosen for CUDA tensors, on fake ones: shapes, export and inference compile without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.graphs import FusedOps, backends_in, compiled_graphs


@pytest.fixture
def fake():
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


@pytest.fixture
def inputs(fake):
    return tuple(torch.empty(2, 17, 48, device="cuda", dtype=torch.bfloat16) for _ in range(2))


def test_forward(inputs):
    y = FusedOps()(*inputs)
    assert y.shape == (2, 17, 96)
    assert y.device.type == "cuda"
    assert y.dtype == torch.bfloat16


def test_export(fake, inputs):
    program = torch.export.export(FusedOps(), inputs)
    assert backends_in(program.graph) == {"triton"}


def test_inference_compile(inputs):
    graphs, y = compiled_graphs(FusedOps(), *inputs)
    assert y.shape == (2, 17, 96)
    assert [backends_in(graph) for graph in graphs] == [{"triton"}]
