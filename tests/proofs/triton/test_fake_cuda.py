"""The triton backend chosen for CUDA tensors, on fake ones: shapes, export and inference compile without a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from internvit.ops import layer_norm, layer_scale_residual_norm, linear_gelu, qk_norm_attention_qkvpacked, rms_norm


class Seam(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(48, device="cuda", dtype=torch.bfloat16))
        self.fc = torch.nn.Linear(48, 96, device="cuda", dtype=torch.bfloat16)

    def forward(self, x, branch):
        x, normed = layer_scale_residual_norm(x, branch, self.weight, gamma=self.weight)
        qkv = torch.stack([normed.unflatten(-1, (3, 16))] * 3, 2)
        out = qk_norm_attention_qkvpacked(qkv, self.weight, self.weight).flatten(2)
        out = rms_norm(out, self.weight) + layer_norm(x, self.weight)
        return linear_gelu(out, self.fc.weight, self.fc.bias)


@pytest.fixture
def fake():
    with FakeTensorMode() as mode, torch.no_grad():
        yield mode


@pytest.fixture
def inputs(fake):
    return tuple(torch.empty(2, 17, 48, device="cuda", dtype=torch.bfloat16) for _ in range(2))


def backends_in(graph):
    return {n.args[-1] for n in graph.nodes if "internvit" in str(n.target)}


def test_forward(inputs):
    y = Seam()(*inputs)
    assert y.shape == (2, 17, 96)
    assert y.device.type == "cuda"
    assert y.dtype == torch.bfloat16


def test_export(fake, inputs):
    program = torch.export.export(Seam(), inputs)
    assert backends_in(program.graph) == {"triton"}


def test_inference_compile(inputs):
    graphs = []

    def keep(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    y = torch.compile(Seam(), fullgraph=True, backend=keep)(*inputs)
    assert y.shape == (2, 17, 96)
    assert len(graphs) == 1
    assert backends_in(graphs[0].graph) == {"triton"}
