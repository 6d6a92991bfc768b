"""vLLM in this process and in those it starts: no network, no GPU, torchvision importable."""

import importlib
import os
import runpy
import sys
from pathlib import Path

TORCHVISION_OPS = Path(__file__).parent / "torchvision_ops"

_kept: list[dict] = []  # torchvision's ops live as long as their library


def variables(cache: Path) -> dict[str, str]:
    """What to set before vLLM is imported. `cache` is for its files."""
    paths = [str(TORCHVISION_OPS)] if _declare_torchvision_ops() else []
    return {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _declare_torchvision_ops() -> bool:
    """Whether torchvision could not be imported without them; its `nms` is an op of its compiled part."""
    if _kept:
        return True
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _kept.append(runpy.run_path(str(TORCHVISION_OPS / "sitecustomize.py")))
        importlib.import_module("torchvision")
    return bool(_kept)
