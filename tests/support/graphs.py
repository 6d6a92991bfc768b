"""A module of every fused op on bfloat16 CUDA tensors, and the backends that its graphs keep."""

import torch
from torch import Tensor

from internvit.ops import layer_norm, layer_scale_residual_norm, linear_gelu, qk_norm_attention_qkvpacked, rms_norm


class FusedOps(torch.nn.Module):
    """x, branch [B, N, 48] -> [B, N, 96]; made inside FakeTensorMode, it needs no GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(48, device="cuda", dtype=torch.bfloat16))
        self.fc = torch.nn.Linear(48, 96, device="cuda", dtype=torch.bfloat16)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        x, normed = layer_scale_residual_norm(x, branch, self.weight, gamma=self.weight)
        qkv = torch.stack([normed.unflatten(-1, (3, 16))] * 3, 2)
        out = qk_norm_attention_qkvpacked(qkv, self.weight, self.weight).flatten(2)
        out = rms_norm(out, self.weight) + layer_norm(x, self.weight)
        return linear_gelu(out, self.fc.weight, self.fc.bias)


def backends_in(graph: torch.fx.Graph) -> set[object]:
    return {n.args[-1] for n in graph.nodes if "internvit" in str(n.target)}


def compiled_graphs(module: torch.nn.Module, *inputs: Tensor) -> tuple[list[torch.fx.Graph], Tensor]:
    """The graphs that torch.compile makes of a call, which then runs them as they are, and its result."""
    graphs = []

    def keep(graph_module: torch.fx.GraphModule, example_inputs: object) -> object:
        graphs.append(graph_module.graph)
        return graph_module.forward

    torch._dynamo.reset()
    y = torch.compile(module, fullgraph=True, backend=keep)(*inputs)
    return graphs, y
