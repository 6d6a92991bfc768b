"""fc1 with exact GELU, forward and backward, next to the eager pair and torch.compile of it."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, gemm_sizes, op_case


def cases(setting: Setting) -> list[BenchmarkCase]:
    return [
        op_case(setting, "linear_gelu", s, dtype, shape=f"{s.batch * s.tokens}x{s.hidden_size}x{4 * s.hidden_size}")
        for s, dtype in gemm_sizes(setting)
    ]


def test_linear_gelu(timed) -> None:
    timed()
