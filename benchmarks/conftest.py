"""Makes pytest-benchmark cases of every `works(setting)`: `pytest benchmarks/`, with `--benchmark-compare` as usual.

A way that breaks the numerics contract fails before it is timed; a missing peer is a skip that says so.
"""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from internvit.benchmarks.harness.cases import BOTH, MissingPeerError, Setting
from internvit.benchmarks.harness.run import callable_for, checked
from internvit.benchmarks.harness.timing import freed_pages_kept, rotating


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("internvit")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--quick", action="store_true", help="small shapes")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "timed" not in metafunc.fixturenames:
        return
    setting = Setting(metafunc.config.getoption("--device"), metafunc.config.getoption("--quick"))
    cases = [
        SimpleNamespace(work=work, mode=mode, variant=variant, device=setting.device)
        for work in metafunc.module.works(setting)
        for mode in work.modes
        for variant in work.variants
        if mode != BOTH or variant.trains
    ]
    names = [f"{c.work.shape}-{c.work.dtype_name}-{c.mode}-{c.variant.name}".replace(" ", "_") for c in cases]
    metafunc.parametrize("timed", cases, ids=names, indirect=True)


def then_wait(call):
    """A GPU call until its result is there."""
    call()
    torch.cuda.synchronize()


@pytest.fixture(scope="session", autouse=True)
def freed_pages() -> Iterator[None]:
    with freed_pages_kept():
        yield


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark):
    """Checks one way of doing one piece of work, then times it."""
    case = request.param

    def run() -> None:
        try:
            function = case.variant.build()
        except MissingPeerError as gap:
            pytest.skip(str(gap))
        failures = checked(case.work, case.variant, case.mode, function) if case.variant.ours else []
        if failures:
            pytest.fail(f"refused, the result is wrong: {'; '.join(failures)}")
        call = rotating(*callable_for(case.work, case.mode, function))
        benchmark.group = f"{case.work.bench} {case.work.shape} {case.work.dtype_name} {case.mode}"
        benchmark.extra_info |= {"variant": case.variant.name, "threads": torch.get_num_threads()}
        if case.device.startswith("cuda"):
            benchmark(then_wait, call)
        else:
            benchmark(call)

    return run
