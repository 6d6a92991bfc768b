"""What this machine has: versions, devices, instruction sets, and which backends run."""

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import torch

from internvit.ops.backends import registry
from internvit.ops.core.select import resolve
from internvit.ops.core.spec import every_spec

_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")
_INTEL_MODELS = {
    "106": "Ice Lake",
    "108": "Ice Lake",
    "143": "Sapphire Rapids",
    "207": "Emerald Rapids",
    "173": "Granite Rapids",
}
_PACKAGES = ("torch", "triton", "numpy", "safetensors", "transformers", "timm", "flash-attn", "huggingface-hub")


def cpu_flags() -> list[str]:
    """The instruction sets that the kernels care about, as the operating system reports them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return [torch.backends.cpu.get_cpu_capability()]
    line = next((x for x in path.read_text().splitlines() if x.startswith(("flags", "Features"))), "")
    return [flag for flag in _FLAGS if flag in line.split()]


def cpu_name(cpuinfo: str | None = None) -> str:
    """The processor's name, and its generation where virtual machines leave that out of the name ("AMD EPYC").

    Args:
        cpuinfo: what /proc/cpuinfo says; read here by default.
    """
    path = Path("/proc/cpuinfo")
    if cpuinfo is None:
        cpuinfo = path.read_text() if path.exists() else ""
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in cpuinfo.splitlines())}
    name = fields.get("model name") or platform.processor()
    name = re.sub(r"\((?:R|TM)\)| (?:CPU|Processor)\b| @ [\d.]+GHz", "", name)
    generation = _generation(fields)
    return name if generation.replace(" ", "") in name.replace(" ", "") else f"{name} ({generation})"


def _generation(fields: dict[str, str]) -> str:
    """Of a processor of AMD or Intel with AVX2; "" where it is not known."""
    vendor, family, model = (fields.get(key, "") for key in ("vendor_id", "cpu family", "model"))
    flags = fields.get("flags", "").split()
    if vendor == "AuthenticAMD":
        return {"23": "Zen 2", "25": "Zen 4" if "avx512f" in flags else "Zen 3", "26": "Zen 5"}.get(family, "")
    if vendor != "GenuineIntel" or family != "6":
        return ""
    if model == "85":
        return "Cooper Lake" if "avx512_bf16" in flags else "Cascade Lake" if "avx512_vnni" in flags else "Skylake"
    return _INTEL_MODELS.get(model, "")


def usable_device(name: str) -> torch.device:
    """The device of this name, if a tensor can be made on it.

    Raises:
        ValueError: no such device, no driver for it, or "meta", which holds no data.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError("device: 'meta' holds no data")
    return device


def info() -> dict[str, Any]:
    """Versions, devices, CPU, and the backends with the reason where one does not run."""
    from internvit import __version__

    versions = {"internvit": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    device = "cuda" if devices else "cpu"
    x = torch.empty(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    chosen = {name: resolve(spec.implemented_as, x, head_dim=64) for name, spec in every_spec().items()}
    return {
        "versions": versions,
        "cpu": {"name": cpu_name(), "threads": torch.get_num_threads(), "instruction sets": cpu_flags()},
        "devices": devices or ["cpu"],
        "backends": registry.table(),
        "chosen": chosen,
    }
