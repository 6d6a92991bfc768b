"""Writes the ops and their Triton kernels as a repository of Hugging Face's `kernels`: `make hub-kernel`.

    python .ci/hub_kernel.py OUT
    kernels.get_local_kernel(Path("OUT")).rms_norm(x, weight)

OUT gets build.toml and torch-ext/ for kernel-builder, and build/torch-cuda, -rocm and -cpu, which load as they are: the
kernels are Triton's and compiled where they run. The code is this package's, with two changes that a hub asks for:
imports are relative, and the ops have a namespace of this build, so that several builds live in one process. Compiled
libraries (backends `cpu` and `cuda`) are not in it.
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FOLDERS = {"ops": ROOT / "internvit" / "ops", "kernels": ROOT / "kernels"}
LEFT_OUT = ("tools", "__pycache__")  # profiles and the tuner need whole models
BACKENDS = ("cuda", "rocm", "cpu")
LICENSE = "Apache-2.0"
INIT = '''"""InternViT's fused ops: forward and backward, on strided views, under autocast, compile and export."""

from . import layers
from .ops import *
from .ops import __all__ as _ops

__all__ = [*_ops, "layers"]
'''
LAYERS = '''"""Modules whose forward `kernels.kernelize` puts into a model's own."""

import torch
from torch import Tensor

from .ops import rms_norm


class InternVLVisionRMSNorm(torch.nn.Module):
    """transformers' RMSNorm of the InternVL tower: y = x * rsqrt(mean(x^2) + eps) * weight."""

    can_torch_compile = True
    has_backward = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)
'''
NAMESPACE = '''"""The namespace that the ops are registered in: this build's own."""

from ..._ops import add_op_namespace_prefix

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
'''
OPS = """import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{namespace}::{{op_name}}"
"""


def relative_imports(text: str, depth: int) -> str:
    """`from internvit.a.b import c` as a relative import of a file `depth` folders below the package."""
    text = re.sub(
        r"^(\s*)from internvit(?:\.([\w.]+))? import", rf"\1from {'.' * (depth + 1)}\2 import", text, flags=re.MULTILINE
    )
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if any(name.partition(".")[0] == "internvit" for name in names):
            raise SystemExit(f"line {node.lineno}: `import internvit` has no relative form")
    return text


def sources() -> dict[Path, str]:
    """Path in the kernel's package -> text."""
    found = {Path("__init__.py"): INIT, Path("layers.py"): LAYERS}
    paths = {Path("numerics.py"): ROOT / "internvit" / "numerics.py"}
    for name, folder in FOLDERS.items():
        paths |= {name / path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    for path, source in paths.items():
        if path.suffix in (".py", ".json") and not set(path.parts) & set(LEFT_OUT):
            text = source.read_text()
            found[path] = relative_imports(text, len(path.parts) - 1) if path.suffix == ".py" else text
    found[Path("ops", "core", "namespace.py")] = NAMESPACE
    return found


def digest(files: dict[Path, str]) -> str:
    text = "".join(f"{path}\0{text}\0" for path, text in sorted(files.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:7]


def write(folder: Path, files: dict[Path, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


def metadata(identifier: str, backend: str, version: int) -> str:
    facts = {"id": identifier, "name": "internvit", "version": version, "license": LICENSE, "python-depends": []}
    return json.dumps(facts | {"backend": {"type": backend}}, indent=2) + "\n"


def build_toml(version: int) -> str:
    listed = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return (
        f'[general]\nedition = 5\nname = "internvit"\nversion = {version}\nlicense = "{LICENSE}"\n'
        f"backends = [{listed}]\n\n[torch-noarch]\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that is not there yet, or empty")
    out = parser.parse_args().out
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"OUT: expected a folder that is not there yet or empty, got {out}")
    version = int(re.search(r'^version = "(\d+)\.', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1])
    files = sources()
    dirty = subprocess.run(["git", "-C", ROOT, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    unique = f"{digest(files)}{'_dirty' if dirty else ''}"
    write(out, {Path("build.toml"): build_toml(version), Path("LICENSE"): (ROOT / "LICENSE").read_text()})
    write(out / "torch-ext" / "internvit", files)
    for backend in BACKENDS:
        namespace = f"_internvit_{backend}_{unique}"
        built = files | {
            Path("_ops.py"): OPS.format(namespace=namespace),
            Path("metadata.json"): metadata(namespace, backend, version),
        }
        write(out / "build" / f"torch-{backend}", built)
    print(f"{out}: build.toml, torch-ext, {', '.join(f'build/torch-{backend}' for backend in BACKENDS)}; {unique}")


if __name__ == "__main__":
    main()
