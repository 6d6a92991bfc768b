"""LayerNorm of rows, forward and backward, next to PyTorch's, Liger's and cuDNN's kernels."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, row_cases
from internvit.benchmarks.harness.cudnn_norms import cudnn_norm
from internvit.benchmarks.harness.peers import liger


def cases(setting: Setting) -> list[BenchmarkCase]:
    return row_cases(
        setting, "layer_norm", "layer_norm", liger(setting, "LigerLayerNorm") | cudnn_norm(setting, "layernorm")
    )


def test_layer_norm(timed) -> None:
    timed()
