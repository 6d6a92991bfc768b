"""QK-norm of q and k in memory, forward and backward, next to PyTorch's RMSNorm."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, attention_cases, attention_sizes


def cases(setting: Setting) -> list[BenchmarkCase]:
    return attention_cases(setting, "qk_norm", attention_sizes(setting, (25, 128)))


def test_qk_norm(timed) -> None:
    timed()
