"""Makes pytest-benchmark cases of every `cases(setting)`: `pytest benchmarks/`, with `--benchmark-compare` as usual.

An implementation that breaks the numerics contract fails before it is timed; a missing peer is a skip that says so.
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
    timed = [
        SimpleNamespace(case=case, mode=mode, implementation=implementation, device=setting.device)
        for case in metafunc.module.cases(setting)
        for mode in case.modes
        for implementation in case.implementations
        if mode != BOTH or implementation.trains
    ]
    names = [
        f"{c.case.bench}-{c.case.shape}-{c.case.dtype_name}-{c.mode}-{c.implementation.name}".replace(" ", "_")
        for c in timed
    ]
    metafunc.parametrize("timed", timed, ids=names, indirect=True)


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
    """Checks one implementation of one case, then times it."""
    param = request.param

    def run() -> None:
        try:
            function = param.implementation.build()
        except MissingPeerError as gap:
            pytest.skip(str(gap))
        failures, _ = checked(param.case, param.implementation, param.mode, function)
        if failures:
            pytest.fail(f"refused, the result is wrong: {'; '.join(failures)}")
        call = rotating(*callable_for(param.case, param.mode, function))
        benchmark.group = f"{param.case.bench} {param.case.shape} {param.case.dtype_name} {param.mode}"
        benchmark.extra_info |= {"variant": param.implementation.name, "threads": torch.get_num_threads()}
        if param.device.startswith("cuda"):
            benchmark(then_wait, call)
        else:
            benchmark(call)

    return run
