"""The residual with LayerScale, forward and backward, next to the eager chain and torch.compile of it."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, row_cases


def cases(setting: Setting) -> list[BenchmarkCase]:
    return row_cases(setting, "layer_scale_residual")


def test_layer_scale_residual(timed) -> None:
    timed()
