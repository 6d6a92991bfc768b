"""RMSNorm of rows, forward and backward, next to PyTorch's, Liger's and cuDNN's kernels."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, row_cases
from internvit.benchmarks.harness.cudnn_norms import cudnn_norm
from internvit.benchmarks.harness.peers import liger


def cases(setting: Setting) -> list[BenchmarkCase]:
    return row_cases(setting, "rms_norm", "rms_norm", liger(setting, "LigerRMSNorm") | cudnn_norm(setting, "rmsnorm"))


def test_rms_norm(timed) -> None:
    timed()
