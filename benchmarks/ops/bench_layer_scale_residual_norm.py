"""The residual with LayerScale and the next norm, next to the eager chain and torch.compile of it."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, op_case, row_sizes

NAME = "layer_scale_residual_norm"


def cases(setting: Setting) -> list[BenchmarkCase]:
    return [
        op_case(setting, NAME, size, dtype, norm, shape=f"{size.batch * size.tokens}x{size.hidden_size} {norm}")
        for norm, size in row_sizes(setting)
        for dtype in setting.dtypes
    ]


def test_layer_scale_residual_norm(timed) -> None:
    timed()
