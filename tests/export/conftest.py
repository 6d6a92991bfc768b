"""Exports of one process share what torch and onnxscript compute anew for each: a third of these tests' time."""

import functools
import importlib.util
from collections.abc import Iterator

import pytest
from torch._export import utils
from torch.export import decomp_utils, exported_program

collect_composite_ops = utils._collect_all_valid_cia_ops


def ask_the_dispatcher_once() -> set:
    """All composite ops: torch asks its dispatcher for the list of them for each of 30 namespaces, twice an export."""
    utils._materialize_cpp_cia_ops()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_materialize_cpp_cia_ops", lambda: None)
        return collect_composite_ops()


@pytest.fixture(scope="session", autouse=True)
def _shared_between_exports() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (decomp_utils, exported_program):
            patch.setattr(module, "_collect_all_valid_cia_ops", ask_the_dispatcher_once)
        if importlib.util.find_spec("onnxscript"):  # reads the source of its 500 functions
            from torch.onnx._internal.exporter._registration import onnxscript_apis

            patch.setattr(onnxscript_apis, "get_torchlib_ops", functools.cache(onnxscript_apis.get_torchlib_ops))
        yield
