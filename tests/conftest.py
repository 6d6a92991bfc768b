"""Settings of every test: uninitialised memory holds NaN, so that an output nobody wrote is seen."""

import contextlib
import gc
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.support.sampling import parts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, metavar="N", help="repeats a run's random data, which is fresh otherwise (see the header)"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """pytest-xdist's workers have the run's seed: each picks the same part of the sampled families."""
    seeds = {name: value for name, value in vars(node.config.option).items() if name in ("seed", "hypothesis_seed")}
    node.workerinput["seeds"] = seeds


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        vars(config.option).update(config.workerinput["seeds"])
    os.environ.pop("INTERNVIT_CPU_UNITS", None)  # what tests compile has every unit
    if config.option.seed is None:
        config.option.seed = torch.seed() % 2**31
    if hasattr(config, "workerinput"):  # of pytest-xdist: a worker a core, so one thread a worker and what it starts
        torch.set_num_threads(1)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    elif getattr(config.option, "numprocesses", None):  # the workers inherit it
        # A thread that waits by spinning takes another worker's core: tests of several threads took 4 times the time.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        # numpy's BLAS reads it when it is imported, which is before a worker comes here. Triton's interpreter uses it
        # for small tiles: two threads a process took 75 times the time where every core was busy.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if getattr(config.option, "hypothesis_seed", "") is None:
        config.option.hypothesis_seed = str(config.option.seed)  # before hypothesis reads it: conftest's hooks go first
    with contextlib.suppress(ImportError):  # a GPU machine has its own packages, and may lack this one
        import hypothesis

        # An example that imports, or meets a loaded machine, is slow and not wrong.
        hypothesis.settings.register_profile("internvit", deadline=None)
        hypothesis.settings.load_profile("internvit")


def pytest_report_header(config: pytest.Config) -> str:
    return f"random data: --seed {config.option.seed}"


def pytest_collection_finish() -> None:
    """What the imports made stays to the end: a walk through it took each gc.collect() of a test 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    # Fills torch.empty with NaN (torch.utils.deterministic); use_deterministic_algorithms would import torch._inductor.
    torch._C._set_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch._C._set_deterministic_algorithms(False)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of the test's own: the same in a run of it alone."""
    return zlib.crc32(f"{request.config.option.seed} {request.node.nodeid}".encode())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    families: defaultdict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if (sampled := item.get_closest_marker("sampled")) is not None:
            families[item.nodeid.partition("[")[0], sampled.args[0]].append(item)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    for (name, count), family in families.items():
        mine = config.option.seed + zlib.crc32(name.partition("::")[0].encode())  # a file's families go together
        parameters = [item.callspec.params if hasattr(item, "callspec") else {} for item in family]
        for item, part in zip(family, parts(parameters, count), strict=True):
            if part != mine % count:
                item.add_marker("slow")
