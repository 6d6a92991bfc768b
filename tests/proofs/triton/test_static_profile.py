"""The static profile's rows, its judgement of them, and the runs of models that they come from."""

import pytest
import torch
from torch import Tensor

from internvit.config import VARIANTS
from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools import roofline
from internvit.kernels.tools.compile_only import (
    Specialization,
    WithoutComputing,
    gpu_target,
    triton_takes_cpu_tensors,
)
from internvit.kernels.tools.model_launches import MODES, architectures
from internvit.kernels.tools.static_profile import failures, occupancy
from internvit.ops import linear
from tests.proofs.triton.test_models_compile import profile, pytestmark  # noqa: F401 (pytest reads it)


@pytest.mark.sampled(4)
def test_rows_can_be_compiled_by_another_program(tmp_path):
    """`source` alone is enough: the kernel's module and name, its signature, constants and options."""
    rows = profile(tmp_path, "--arch", "sm_90", "--only", "300m-448px bfloat16: eval, wide")
    fields = "kernel config arch registers spills stack_bytes shared_bytes occupancy matrix_instructions modes"
    row = next(row for row in rows if row["kernel"] == "gelu_kernel")
    assert set(row) >= {*fields.split(), "global_16_byte_share", "ceiling_us", "source"}
    assert row["ceiling_us"] == pytest.approx(2 * 2 * (32 * 38 + 1) * 4096 * 2 / 3.35e12 * 1e6, abs=1e-3)
    source = dict(row["source"])
    assert source.pop("target") == "sm_90"
    one = Specialization(**source)
    compiled = one.compile(TARGETS["sm_90"])
    assert compiled.metadata.shared == row["shared_bytes"]
    assert compiled.metadata.target == gpu_target(TARGETS["sm_90"])


def test_every_published_model_is_run_in_every_way_that_matters():
    configs = architectures()
    assert {c.hidden_size for c in configs.values()} == {c.hidden_size for c in VARIANTS.values()}
    assert {c.image_size for c in configs.values()} == {c.image_size for c in VARIANTS.values()}
    assert sum(len(mode.dtypes) for mode in MODES.values()) > 50


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"spills": 8}, "sm_89 attention_kernel: bf16 D=64 (a model: train): 8 bytes spilled"),
        ({"shared_bytes": 101377}, "101377 bytes of shared memory, the device has 101376"),
        ({"matrix_instructions": {}}, "no matrix instructions"),
        ({"error": "CompilationError: 'NoneType'"}, "does not compile: CompilationError: 'NoneType'"),
    ],
)
def test_failures_name_the_kernel(change, says):
    row = {"kernel": "attention_kernel", "config": "bf16 D=64", "arch": "sm_89", "modes": ["a model: train"]}
    row |= {"spills": 0, "shared_bytes": 101376, "matrix_instructions": {"HMMA": 4}}
    found = list(failures(row | change))
    assert len(found) == (says is not None)
    assert all(says in failure for failure in found)


def test_linears_are_a_gpus_on_every_cpu(monkeypatch):
    """A CPU without bfloat16 products widens their operands; the tensors of a static profile stand for a GPU's."""
    monkeypatch.setattr(linear, "cpu_multiplies", lambda dtype: False)
    x = torch.empty(16, 8, dtype=torch.bfloat16)
    assert linear.emulated(x)
    with triton_takes_cpu_tensors():
        assert not linear.emulated(x)
        assert not linear.widens(x, x)
    assert linear.emulated(x)


def test_nothing_is_computed_and_shapes_are_right(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    with WithoutComputing():
        x = torch.empty(1 << 15, 1 << 14)  # 2 GiB that are never touched, and a product of 4 million million terms
        y = torch.nn.functional.gelu(x.t() @ torch.empty(1 << 15, 1 << 14)).sum(0, keepdim=True)
        x.mul_(2)
        assert not bool((x > 1).any())
    assert y.shape == (1, 1 << 14)
    assert isinstance(y, Tensor)
    assert y.device.type == "cpu"


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 128, 0, 8, 0.25),  # 65536 / (128 * 256) = 2 programs of 8 warps, of 64
        ("sm_89", 128, 0, 8, 1 / 3),
        ("sm_89", 32, 60_000, 4, 4 / 48),  # 100 KiB a multiprocessor
        ("gfx942", 128, 0, 4, 0.5),
        ("gfx1100", 96, 0, 4, 1.0),
    ],
)
def test_occupancy(arch, registers, shared, warps, expected):
    assert occupancy(TARGETS[arch], registers, shared, warps) == pytest.approx(expected)


def test_ceilings():
    h100 = next(c for c in roofline.CEILINGS if c.target == "sm_90")
    assert h100.seconds(3.35e12, 0) == 1
    assert h100.seconds(0, 989.4e12) == 1
    q, lse = torch.empty(2, 1025, 16, 64, device="meta", dtype=torch.bfloat16), torch.empty(2, 16, 1025, device="meta")
    bytes_moved, flops = roofline.kernel_work("attention_kernel", [q, q, lse])
    assert bytes_moved == q.numel() * 2 + lse.numel() * 4, "a tensor given twice is moved once"
    assert flops == 2 * (2 * 2 * 16 * 1025**2 * 64)
    pack, ends = q.flatten(0, 1)[None], torch.empty(3, dtype=torch.int32)
    assert roofline.kernel_work("attention_kernel", [pack, pack, lse, ends])[1] == flops, "two images, packed"
    assert {c.target for c in roofline.CEILINGS} == set(TARGETS)
