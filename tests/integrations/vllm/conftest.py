"""An environment for vLLM in this process and in those it starts: no network, no GPU, torchvision importable."""

import importlib
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TORCHVISION_OPS = Path(__file__).parent / "torchvision_ops"


@pytest.fixture(scope="session")
def vllm_environment(tmp_path_factory) -> Iterator[None]:
    python_path = [str(TORCHVISION_OPS)] if _declare_torchvision_ops() else []
    variables = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("vllm-cache")),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONPATH": os.pathsep.join([*python_path, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


def _declare_torchvision_ops() -> bool:
    """Whether torchvision could not be imported without them; its `nms` is an op of its compiled part."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_torchvision_ops.namespace = runpy.run_path(str(TORCHVISION_OPS / "sitecustomize.py"))
        importlib.import_module("torchvision")
        return True
    return False


@pytest.fixture
def poisoned_memory() -> None:
    """None of it: vLLM's CPU attention reads blocks of the cache that nobody has written, and masks them."""
