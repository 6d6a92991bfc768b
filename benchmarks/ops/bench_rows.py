"""Row ops without a file of their own, on their example's arguments, next to the plain formula and torch.compile."""

from internvit.benchmarks.harness.cases import BenchmarkCase, Setting
from internvit.benchmarks.harness.run import OPS, has_file
from internvit.benchmarks.harness.run import cases as cases_of


def cases(setting: Setting) -> list[BenchmarkCase]:
    return cases_of(tuple(op for op in OPS if not has_file(op)), setting)


def test_rows(timed) -> None:
    timed()
