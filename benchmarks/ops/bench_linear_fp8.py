"""A Linear of fp8 operands with its epilogue, next to the plain formula in float32."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting, quantized_linear_cases


def cases(setting: Setting) -> list[BenchmarkCase]:
    return quantized_linear_cases(setting, "linear_fp8")


def test_linear_fp8(timed) -> None:
    timed()
