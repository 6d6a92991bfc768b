"""The built library on a machine without a GPU: it loads, registers its ops, and graphs keep backend `cuda`."""

import inspect
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import internvit
from internvit.export.program import ExportedModel, export_program
from internvit.ops.backends import native, registry, schemas
from internvit.ops.backends.registry import implementation
from internvit.ops.core import select as backends
from tests.proofs.cuda.static_profile import LIBRARY
from tests.support.choices import forget_choices
from tests.support.graphs import FusedOps, backends_in, compiled_graphs
from tests.support.models import CONFIGS

OPS = schemas.schemas("internvit_cuda")

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None and not LIBRARY.exists(), reason="needs nvcc: internvit_cuda is not built without it"
)


def test_it_loads_without_a_device_and_asks_for_none() -> None:
    code = """
import torch
def refuse(*args): raise AssertionError("a device was asked for")
torch.cuda.is_available = torch.cuda.device_count = torch.cuda.get_device_properties = refuse
from internvit.ops.backends import native
assert native.unavailable_reason("internvit_cuda") is None, native.unavailable_reason("internvit_cuda")
assert not torch.cuda.is_initialized()
print(sorted(name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "internvit_cuda" in name))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == sorted(OPS)


@pytest.mark.parametrize("op", OPS)
def test_each_op_has_the_references_arguments(op) -> None:
    native.unavailable_reason("internvit_cuda")  # loads it
    schema = getattr(torch.ops.internvit_cuda, op).default._schema
    assert len(schema.arguments) == len(inspect.signature(implementation(op, "reference")).parameters)
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CUDA")


def test_it_needs_nothing_that_torch_does_not_bring() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf (binutils)")
    told = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in told.splitlines() if "NEEDED" in line}
    system = ("libstdc++", "libm.", "libgcc_s", "libc.", "libpthread", "libdl", "librt", "ld-linux")
    mine = {n for n in needed if not n.startswith(system)}
    assert all(n.startswith(("libtorch_cuda", "libtorch_cpu", "libc10", "libtorch", "libcudart")) for n in mine), mine
    assert "RUNPATH" not in told


def test_fake_cuda_tensors_forward_export_and_compile() -> None:
    with FakeTensorMode(), torch.no_grad(), internvit.backend("cuda"):
        x = torch.empty(2, 17, 48, device="cuda", dtype=torch.bfloat16)
        module = FusedOps()
        y = module(x, x)
        assert (y.shape, y.dtype, y.device.type) == ((2, 17, 96), torch.bfloat16, "cuda")
        assert backends_in(torch.export.export(module, (x, x)).graph) == {"cuda"}
        graphs, _ = compiled_graphs(module, x, x)
    assert [backends_in(graph) for graph in graphs] == [{"cuda"}]


def test_without_triton_auto_takes_it(monkeypatch) -> None:
    import dataclasses

    absent = dataclasses.replace(registry.BACKENDS["triton"], unavailable_reason=lambda: "not here")
    monkeypatch.setitem(registry.BACKENDS, "triton", absent)
    forget_choices()
    with FakeTensorMode():
        x = torch.empty(2, 17, 2, 8, device="cuda", dtype=torch.bfloat16)
        for op in ("rms_norm", "qk_norm", "attention", "linear_gelu"):
            assert backends.resolve(op, x, head_dim=8) == "cuda"
        assert backends.resolve("attention", x, head_dim=8, folded=True) == "reference"
    forget_choices()


def test_flash_attn_is_used_where_it_takes_the_tensors(monkeypatch) -> None:
    from internvit.ops.backends import cuda, flash

    assert cuda._attention_backend(torch.ones(1)) == "sdpa"
    monkeypatch.setattr(flash.FlashLibrary, "installed", lambda library: True)
    with FakeTensorMode():
        q = torch.empty(1, 2, 2, 8, device="cuda", dtype=torch.bfloat16)
        assert cuda._attention_backend(q) == "flash"
        assert cuda._attention_backend(q.float()) == "sdpa"


def test_a_program_for_a_process_without_python_calls_the_library() -> None:
    """What `internvit export --to aoti --backend cuda` packages: raw ops of the library and PyTorch's, nothing that
    needs Python. Its batch stays open, and its arguments have the types that packages for CPUs have too."""
    config = CONFIGS["tiny-rms_norm"].replace(num_hidden_layers=2)
    with FakeTensorMode(), torch.no_grad():
        model = ExportedModel(internvit.InternViT(config, device="cuda").eval())
        program = export_program(model, (42, 56), None, "cuda")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    ours = {name.removesuffix(".default") for name in targets if name.startswith("internvit")}
    assert ours == {f"internvit_cuda.{op}" for op in ("gelu", "layer_scale_residual", "rms_norm")}
    assert "aten.scaled_dot_product_attention.default" in targets
    (pixels,) = (node.meta["val"] for node in program.graph.nodes if node.name == "pixel_values")
    assert isinstance(pixels.shape[0], torch.SymInt)
    assert pixels.device.type == "cuda"

    def types(library: str) -> set[str]:
        forward = [schema for name, schema in schemas.schemas(library).items() if not name.endswith("_backward")]
        return {str(a.type) for schema in forward for a in torch._C.parse_schema(schema).arguments}

    assert types("internvit_cuda") <= types("internvit_cpu")
