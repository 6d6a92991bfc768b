"""What is released beside the sources: a repository for `kernels`, the wheels' and the citation's versions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import internvit
from tests.support import ROOT


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "internvit"
    done = subprocess.run([sys.executable, ROOT / ".ci" / "hub_kernel.py", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_one_version_everywhere() -> None:
    version = re.escape(internvit.__version__)
    for name, line in {
        "pyproject.toml": f'^version = "{version}"$',
        "CITATION.cff": f"^version: {version}$",
        "CHANGELOG.md": rf"^## {version} \((unreleased|20\d\d-\d\d-\d\d)\)$",
    }.items():
        assert re.search(line, (ROOT / name).read_text(), re.MULTILINE), name


def test_the_hub_kernel_has_relative_imports_and_no_ops_of_ours(hub) -> None:
    for path in hub.rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) internvit", text, re.MULTILINE), path
        assert "torch.ops.internvit." not in text, path


@pytest.mark.sampled(4)  # 8 s
def test_the_hub_kernel_loads_beside_the_package_and_computes(hub) -> None:
    """By the loader of `kernels`, offline; its Triton kernels in the interpreter."""
    pytest.importorskip("kernels", minversion="0.17", reason="the package kernels (0.17 or newer) is not installed")
    code = f"""
import internvit, kernels, torch
from kernels._rust import Build
from pathlib import Path

folder = Path({str(hub)!r})
assert [str(b).lower() for b in Build.open(folder).general.backends] == ["cuda", "rocm", "cpu"]
ours, theirs = internvit.ops, kernels.get_local_kernel(folder, backend="cpu")
assert theirs.__file__.startswith(str(folder)), theirs.__file__
namespace = theirs.ops.core.namespace.NAMESPACE
assert namespace.startswith("_internvit_cpu_") and hasattr(getattr(torch.ops, namespace), "rms_norm")
for name, inputs in {{
    "rms_norm": (torch.randn(3, 64), torch.randn(64)),
    "layer_scale_residual_norm": (torch.randn(2, 3, 64), torch.randn(2, 3, 64), torch.randn(64)),
    "qk_norm_attention_qkvpacked": (torch.randn(1, 5, 3, 2, 32), torch.randn(64), torch.randn(64)),
}}.items():
    results = []
    for ops in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with ops.backend("triton"):
            out = getattr(ops, name)(*leaves)
        outputs = [out] if isinstance(out, torch.Tensor) else list(out)
        sum((y * y).sum() for y in outputs).backward()
        results.append([*outputs, *(x.grad for x in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name
norm = theirs.layers.InternVLVisionRMSNorm()
norm.weight, norm.variance_epsilon = torch.randn(64), 1e-6
x = torch.randn(3, 64)
torch.testing.assert_close(norm(x), ours.rms_norm(x, norm.weight, eps=1e-6))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "legacy" not in done.stderr  # build.toml is of the newest edition


def test_an_existing_folder_is_not_written_into(hub) -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci" / "hub_kernel.py", hub], capture_output=True, text=True)
    assert done.returncode == 1
    assert "expected a folder that is not there yet" in done.stderr
