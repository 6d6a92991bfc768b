"""cuDNN's norms as peers; its front end builds graphs without a GPU, and plans them only on one."""

import pytest
import torch

from internvit.benchmarks.harness.cases import MissingPeerError, Setting
from internvit.benchmarks.harness.cudnn_norms import cudnn_norm, graph_of
from internvit.benchmarks.ops import bench_rms_norm


def test_forward_alone_and_on_a_gpu_alone() -> None:
    (case, *_) = bench_rms_norm.cases(Setting("cuda"))
    (peer,) = (one for one in case.implementations if one.name == "cuDNN")
    assert not peer.trains
    with pytest.raises(MissingPeerError, match="need a GPU"):
        cudnn_norm(Setting("cpu"), "rmsnorm")["cuDNN"]()


@pytest.mark.parametrize(("norm", "operands"), [("rmsnorm", 1), ("layernorm", 2)])
def test_graphs_of_its_own_front_end(norm: str, operands: int) -> None:
    pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    vector = torch.Size((1, 64, 1, 1))
    _, tensors = graph_of(norm, torch.bfloat16, torch.Size((8, 64, 1, 1)), *[vector] * operands)
    assert [tuple(t.get_dim()) for t in tensors] == [(8, 64, 1, 1), *[vector] * operands, (1, 1, 1, 1), (8, 64, 1, 1)]
    assert len({str(t.get_data_type()) for t in (tensors[0], tensors[1], tensors[-1])}) == 1
