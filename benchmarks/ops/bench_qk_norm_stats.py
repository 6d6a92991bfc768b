"""The statistics of QK-norm, forward and backward, next to the eager formula."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, attention_cases, attention_sizes


def cases(setting: Setting) -> list[BenchmarkCase]:
    return attention_cases(setting, "qk_norm_stats", attention_sizes(setting, (25, 128)))


def test_qk_norm_stats(timed) -> None:
    timed()
