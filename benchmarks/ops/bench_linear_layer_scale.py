"""fc2 with LayerScale folded into its weight while both train, next to the eager pair."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, gemm_sizes, op_case


def cases(setting: Setting) -> list[BenchmarkCase]:
    shapes = [
        (s, dtype, f"{s.batch * s.tokens}x{4 * s.hidden_size}x{s.hidden_size}") for s, dtype in gemm_sizes(setting)
    ]
    return [op_case(setting, "linear_layer_scale", size, dtype, shape=shape) for size, dtype, shape in shapes]


def test_linear_layer_scale(timed) -> None:
    timed()
