"""cuDNN's norms as peers, by NVIDIA's Python front end: forward alone. Written without a GPU, and never run on one.

Source: NVIDIA/cudnn-frontend 1.32, samples/python/20_layernorm.ipynb and 22_rmsnorm.ipynb.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from internvit.benchmarks.harness.cases import ForwardOnly, MissingPeerError, Setting, needs


def cudnn_norm(setting: Setting, norm: str, eps: float = 1e-6) -> dict[str, Callable[[], Callable]]:
    """The peer "cuDNN" of norm "rmsnorm" or "layernorm" on x [rows, C], weight [C] and, for LayerNorm, bias [C]."""

    def build() -> Callable:
        if not setting.device.startswith("cuda"):
            raise MissingPeerError("cuDNN's norms need a GPU")
        needs("cudnn", "pip install nvidia-cudnn-frontend")
        plans = functools.lru_cache(functools.partial(_plan, norm))
        epsilon = torch.full((1, 1, 1, 1), eps)

        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            given = [t.view(-1, t.shape[-1], 1, 1) for t in (x, weight, bias) if t is not None]
            graph, tensors, workspace = plans(x.device.index, x.dtype, *(t.shape for t in given))
            out = torch.empty_like(given[0])
            graph.execute(dict(zip(tensors, (*given, epsilon, out), strict=True)), workspace)
            return out.view(x.shape)

        return run

    return {"cuDNN": ForwardOnly(build)}


def graph_of(norm: str, dtype: torch.dtype, *shapes: torch.Size) -> tuple[Any, list[Any]]:
    """A cuDNN graph of the norm, not built yet, and its tensors: inputs of `shapes` in order, epsilon, the output."""
    import cudnn

    graph = cudnn.pygraph(intermediate_data_type=cudnn.data_type.FLOAT, compute_data_type=cudnn.data_type.FLOAT)
    inputs = [graph.tensor_like(torch.empty(shape, dtype=dtype)) for shape in shapes]
    epsilon = graph.tensor_like(torch.empty(1, 1, 1, 1))
    named = dict(zip(("input", "scale", "bias"), inputs, strict=False))
    phase = cudnn.norm_forward_phase.INFERENCE
    out, *_ = getattr(graph, norm)(name=norm, norm_forward_phase=phase, epsilon=epsilon, **named)
    out.set_output(True).set_data_type(inputs[0].get_data_type())
    return graph, [*inputs, epsilon, out]


def _plan(norm: str, device: int, dtype: torch.dtype, *shapes: torch.Size) -> tuple[Any, list[Any], Tensor]:
    """The graph with the plan that cuDNN's heuristics choose, its tensors, and its workspace."""
    import cudnn

    with torch.cuda.device(device):
        graph, tensors = graph_of(norm, dtype, *shapes)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=f"cuda:{device}")
    return graph, tensors, workspace
