"""What the compiler makes of kernels that no interpreter shows: widths of loads, orders of sums, shared memory."""

import collections
import itertools
import os
import re

import pytest
import torch

from internvit.kernels.attention.backward import attention_backward
from internvit.kernels.attention.config import AttentionConfig
from internvit.kernels.attention.forward import attention
from internvit.kernels.common.rows import row_config
from internvit.kernels.common.strides import stride_unit
from internvit.kernels.common.target import TARGETS
from internvit.kernels.layer_scale_residual_norm import layer_scale_residual_norm, layer_scale_residual_norm_backward
from internvit.kernels.linear import LinearConfig, linear
from internvit.kernels.norm import layer_norm, norm, norm_gradients, rms_norm
from internvit.kernels.qk_norm import qk_norm
from internvit.kernels.tools.compile_only import specializing
from internvit.kernels.tools.model_launches import KernelUse
from internvit.kernels.tools.static_profile import profile

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process, not compiled"
)


def specializations(arch, function, *args):
    found = []
    with specializing(TARGETS[arch], lambda one, specialization: found.append(specialization)):
        function(*args)
    return found


def compiled_rows(arch, function, *args):
    uses = [KernelUse(one, [], 0.0, 0.0) for one in specializations(arch, function, *args)]
    return {use.specialization.function: profile(use, TARGETS[arch]) for use in uses}


def summed_layouts(arch, function, *args):
    """The layout in registers of each sum over a row, by kernel: it fixes the order of the additions."""
    layouts = {}
    for one in specializations(arch, function, *args):
        code = one.compile(TARGETS[arch]).asm["ttgir"]
        names = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
        sums = re.findall(r'"tt\.reduce"\(%[\w#]+\) <\{axis = 1.*?\}\) : \(tensor<([^>]*), (#\w+)>\)', code, re.DOTALL)
        assert sums
        layouts[one.function] = [(shape, names[layout]) for shape, layout in sums]
    return layouts


WIDTHS = [("sm_90", "bfloat16", "float32", channels) for channels in (40, 384, 1024, 3200)]
DTYPES = [
    ("gfx942", "bfloat16", "float32", 1024),
    ("sm_90", "float16", "float32", 1024),
    ("sm_90", "bfloat16", "bfloat16", 1024),
    ("sm_90", "float32", "float32", 1024),
]


@pytest.mark.parametrize(("arch", "dtype", "residual_dtype", "channels"), WIDTHS + DTYPES)
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_residual_is_summed_in_one_order(arch, norm_type, dtype, residual_dtype, channels):
    """The fused op, and the norm of its residual: with eight neighbours a thread in one and four in the other, 36 % of
    the sums of squares differed in bits for a bfloat16 branch beside a float32 residual."""
    residual = torch.empty(2, 1025, channels, dtype=getattr(torch, residual_dtype))
    branch = torch.empty(2, 1025, channels, dtype=getattr(torch, dtype))
    weight = torch.empty(channels, dtype=branch.dtype)
    bias = weight if norm_type == "layer_norm" else None
    args = (residual, branch, weight, None, weight, bias, 1e-6, norm_type, "fused")
    fused = summed_layouts(arch, layer_scale_residual_norm, *args)["layer_scale_residual_norm_kernel"]
    if norm_type == "layer_norm":
        apart = summed_layouts(arch, layer_norm, residual, weight, weight, 1e-6)
    else:
        apart = summed_layouts(arch, rms_norm, residual, weight, 1e-6, "fused")
    assert fused == apart["norm_kernel"]


@pytest.mark.parametrize("channels", [40, 384, 1024, 3200])
def test_float32_residuals_gradient_is_summed_in_one_order(channels):
    residual, grad = torch.empty(2, 1025, channels), torch.empty(2, 1025, channels, dtype=torch.bfloat16)
    weight, rstd = torch.empty(channels, dtype=torch.bfloat16), torch.empty(2, 1025)
    args = (None, grad, residual, None, None, None, weight, rstd, rstd, "rms_norm", (True, True, False, False, False))
    fused = summed_layouts("sm_90", layer_scale_residual_norm_backward, *args)
    config = row_config("rms_norm_backward", channels, TARGETS["sm_90"])
    args = (config, residual, residual, weight, None, rstd, "rms_norm", (True, False, False))
    apart = summed_layouts("sm_90", norm_gradients, *args)
    assert fused["layer_scale_residual_norm_backward_kernel"] == apart["norm_backward_kernel"]


def arithmetic(arch, function, *args):
    """How many float32 additions, products and fused multiply-adds a thread of each kernel does, by kernel."""
    counts = {}
    for one in specializations(arch, function, *args):
        counts[one.function] = collections.Counter()
        code = one.compile(TARGETS[arch]).asm["ptx"]
        instructions = re.findall(r"^\s*(fma|mul|add|sub)\.(?:\w+\.)*?f32(x2)?(?:\.b?f16)?\s", code, re.MULTILINE)
        for name, pair in instructions:
            counts[one.function]["add" if name == "sub" else name] += 2 if pair else 1
    return counts


ELEMENTS = 16  # of a thread, both of 1024 and of 3200 channels
ROUNDINGS = [
    pytest.param(arch, dtype, residual_dtype, channels, id=f"{arch}-{dtype}-{residual_dtype}-{channels}")
    for arch, dtype, residual_dtype, channels in (
        ("sm_90", "bfloat16", "float32", 1024),
        ("sm_90", "float32", "float32", 3200),
        ("sm_100", "bfloat16", "bfloat16", 1024),  # multiply-adds in pairs
        ("sm_100", "float32", "float32", 3200),
    )
]


@pytest.mark.parametrize(("arch", "dtype", "residual_dtype", "channels"), ROUNDINGS)
@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_fused_op_rounds_as_two_ops(arch, norm_type, dtype, residual_dtype, channels):
    """Forward the fused op does the norm's arithmetic and one multiply-add an element more, spelt out; backward the
    norm's and an addition. Left to the compiler, the last product of the norm's gradient was contracted with that
    addition, and on sm_100 the terms of a row's sum of squares with each other or not."""
    residual = torch.empty(2, 1025, channels, dtype=getattr(torch, residual_dtype))
    branch = torch.empty(2, 1025, channels, dtype=getattr(torch, dtype))
    weight, rstd = torch.empty(channels, dtype=branch.dtype), torch.empty(2, 1025)
    bias, mean = (weight, rstd) if norm_type == "layer_norm" else (None, None)
    args = (residual, branch, weight, None, weight, bias, 1e-6, norm_type, "fused")
    fused = arithmetic(arch, layer_scale_residual_norm, *args)["layer_scale_residual_norm_kernel"]
    config = row_config(norm_type, channels, TARGETS[arch])
    apart = arithmetic(arch, norm, config, residual, weight, bias, 1e-6, norm_type, "fused")["norm_kernel"]
    assert fused - apart == {"fma": ELEMENTS}
    assert not apart - fused
    mask = (True, False, False, False, False)
    args = (residual, branch, residual, None, None, None, weight, rstd, rstd, norm_type, mask)
    fused = arithmetic(arch, layer_scale_residual_norm_backward, *args)["layer_scale_residual_norm_backward_kernel"]
    args = (config, residual, residual, weight, mean, rstd, norm_type, (True, False, False))
    apart = arithmetic(arch, norm_gradients, *args)["norm_backward_kernel"]
    assert fused - apart == {"add": ELEMENTS}
    assert not apart - fused


SUMS_IN_CI = (("sm_90", 64, False), ("gfx942", 128, True))
SUMS = [
    pytest.param(arch, *heads, marks=() if (arch, *heads) in SUMS_IN_CI else pytest.mark.slow)
    for arch, heads in itertools.product(TARGETS, ((64, False), (128, True)))
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("arch", "head_dim", "normed"), SUMS)
def test_float32_attention_sums_each_tile_by_itself(arch, head_dim, normed):
    """Of its products none goes on from the last tile's sum, in one chain of additions over all tokens."""
    x = torch.empty(1, 1025, 2, head_dim)
    weight = torch.empty(2 * head_dim) if normed else None
    rstd = torch.empty(1, 1025) if normed else None
    lse = torch.empty(1, 2, 1025)
    args = (weight, weight, rstd, rstd)
    found = specializations(arch, attention, x, x, x, 0.125, *args)
    found += specializations(arch, attention_backward, x, x, x, x, x, lse, 0.125, *args, x, x, x)
    products = collections.Counter()
    for one in found:
        code = one.compile(TARGETS[arch]).asm["ttgir"]
        zeros = set(re.findall(r"(%\w+) = arith.constant dense<0.0", code))
        starts = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", code)
        assert set(starts) <= zeros, one.function
        products[one.function] += len(starts)
    assert all(products[f"attention_{kernel}"] for kernel in ("kernel", "grad_q_kernel", "grad_kv_kernel"))


@pytest.mark.parametrize(("strides", "unit"), [((72, 3456), 8), ((64, 3072), 1), ((72, 20), 1), ((0, 8), 8), ((), 1)])
def test_stride_unit(strides, unit):
    assert stride_unit(*strides) == unit


@pytest.mark.sampled(3)
@pytest.mark.parametrize("head_dim", [72, 88, 104])
def test_heads_that_8_divides_load_16_bytes(head_dim):
    """SigLIP-SO400M, EVA-g and OpenCLIP bigG: 2 bytes a load when strides are known to divide by 16 or not at all."""
    q, k, v = torch.empty(2, 577, 3, 16, head_dim, dtype=torch.bfloat16).unbind(2)
    none = (None,) * 4
    rows = compiled_rows("sm_90", attention, q, k, v, 0.1, *none)
    lse = torch.empty(2, 16, 577)
    rows |= compiled_rows("sm_90", attention_backward, q, q, k, v, q, lse, 0.1, *none, q, k, v)
    for name, row in rows.items():
        assert row["global_16_byte_share"] > 0.4, name
        assert row["spills"] == 0, name


@pytest.mark.parametrize("arch", ["sm_86", pytest.param("sm_120", marks=pytest.mark.slow)])
def test_a_masked_tail_of_queries_does_not_spill(arch):
    """grad_kv with QK-norm at D = 128: with a mask on the rows of each load it spilled 8 bytes at 255 registers."""
    q, k, v = torch.empty(1, 1000, 3, 25, 128, dtype=torch.bfloat16).unbind(2)
    weight, rstd, lse = torch.empty(3200, dtype=torch.bfloat16), torch.empty(1, 1000), torch.empty(1, 25, 1000)
    args = (q, q, k, v, q, lse, 0.1, weight, weight, rstd, rstd, q, k, v)
    (grad_kv,) = (one for one in specializations(arch, attention_backward, *args) if "grad_kv" in one.function)
    row = profile(KernelUse(grad_kv, [], 0.0, 0.0), TARGETS[arch])
    assert row["spills"] == 0
    assert row["registers"] < 200


@pytest.mark.sampled(2)
@pytest.mark.parametrize("arch", ["sm_90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_86", "sm_120"))])
@pytest.mark.parametrize("head_dim", [72, pytest.param(128, marks=pytest.mark.slow)])
def test_packs_of_other_heads_do_not_spill(arch, head_dim):
    """Those that no model of ours has; the models' own packs are compiled with all they launch."""
    q, k, v = torch.empty(3000, 3, 16, head_dim, dtype=torch.bfloat16).unbind(1)
    none, given = (None,) * 4, (torch.empty(9, dtype=torch.int32), 1025)
    rows = compiled_rows(arch, attention, q, k, v, 0.1, *none, *given)
    rows |= compiled_rows(arch, attention_backward, q, q, k, v, q, torch.empty(16, 3000), 0.1, *none, q, k, v, *given)
    assert len(rows) == 4
    for name, row in rows.items():
        assert row["spills"] == 0, name
        assert row["shared_bytes"] <= TARGETS[arch].shared_bytes, name


@pytest.mark.sampled(2)
@pytest.mark.parametrize("arch", ["sm_90", *(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_120"))])
def test_float32_packs_do_not_spill(arch):
    """With a copy of the loop's body for the last tile of keys forward and grad_q took 255 registers on sm_90."""
    q, k, v = torch.empty(3000, 3, 16, 64).unbind(1)
    none, given = (None,) * 4, (torch.empty(9, dtype=torch.int32), 1025)
    rows = compiled_rows(arch, attention, q, k, v, 0.1, *none, *given)
    rows |= compiled_rows(arch, attention_backward, q, q, k, v, q, torch.empty(16, 3000), 0.1, *none, q, k, v, *given)
    for name in ("attention_kernel", "attention_grad_q_kernel"):
        assert rows[name]["spills"] == 0, name
        assert rows[name]["registers"] < 200, name


IN_CI = (("sm_90", 64, True), ("gfx942", 64, True))
OTHER_KEYS = [
    pytest.param(*case, marks=() if case in IN_CI else pytest.mark.slow)
    for case in itertools.product(TARGETS, (64, 128), (True, False))
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("arch", "head_dim", "packed"), OTHER_KEYS)
def test_other_keys_than_queries_do_not_spill(arch, head_dim, packed):
    """No model launches these kernels: packs and batches whose keys are not the queries' own."""
    q, kv = torch.empty(1, 3000, 16, head_dim).bfloat16(), torch.empty(2, 1, 600, 16, head_dim).bfloat16()
    heads, lse, none, given = (q, *kv), torch.empty(1, 16, 3000), (None,) * 4, ()
    if packed:
        ends = torch.empty(9, dtype=torch.int32)
        heads, lse, given = [t[0] for t in heads], lse[0], (ends, 1025, ends, 200)
    rows = compiled_rows(arch, attention, *heads, 0.1, *none, *given)
    args = (heads[0], *heads, heads[0], lse, 0.1, *none, *heads, *given)
    rows |= compiled_rows(arch, attention_backward, *args)
    assert len(rows) == 4
    for name, row in rows.items():
        assert row["spills"] == 0, name
        assert row["shared_bytes"] <= TARGETS[arch].shared_bytes, name


def test_rows_that_8_divides_load_16_bytes():
    """Neighbours of that fault: the row kernels' stride, and QK-norm's tokens."""
    x, weight = torch.empty(2, 577, 1160, dtype=torch.bfloat16), torch.empty(1160, dtype=torch.bfloat16)
    assert compiled_rows("sm_90", rms_norm, x, weight, 1e-6, "fused")["norm_kernel"]["global_16_byte_share"] > 0.4
    q, k, _ = torch.empty(2, 577, 3, 5, 232, dtype=torch.bfloat16).unbind(2)
    rows = compiled_rows("sm_90", qk_norm, q, k, weight, weight, 1e-6, "fused")
    assert rows["qk_norm_kernel"]["global_16_byte_share"] > 0.4


@pytest.mark.parametrize("gelu", [True, False])
def test_two_gemm_programs_share_a_multiprocessor(gelu):
    """One's epilogue runs during the other's products: of whole tiles it held 155 registers a thread."""
    x, weight = torch.empty(2, 1025, 1024, dtype=torch.bfloat16), torch.empty(4096, 1024, dtype=torch.bfloat16)
    vector, residual = torch.empty(4096, dtype=torch.bfloat16), torch.empty(2, 1025, 4096, dtype=torch.bfloat16)
    args = (vector, None, None, True, True) if gelu else (vector, vector, residual)
    row = compiled_rows("sm_90", linear, "linear_gelu", x, weight, *args)["linear_kernel"]
    assert row["registers"] <= 128
    assert row["occupancy"] == 2 * 8 / 64
    assert row["loop"]["products"] == 1.0


@pytest.mark.parametrize(("K", "N"), [(1001, 257), (1024, 257), (1160, 1160)])
def test_gemms_of_rows_that_16_does_not_divide_do_not_spill(K, N):
    x, weight = torch.empty(2, 1025, K, dtype=torch.bfloat16), torch.empty(N, K, dtype=torch.bfloat16)
    row = compiled_rows("sm_90", linear, "linear_gelu", x, weight, None, None, None, True, True)["linear_kernel"]
    assert row["spills"] == 0


@pytest.mark.parametrize("arch", TARGETS)
def test_gemm_tiles_in_flight_fit_half_the_shared_memory(arch):
    config = LinearConfig.rule(1024, 4096, 2, TARGETS[arch])
    held = config.stages - TARGETS[arch].is_amd  # mfma and wmma keep one stage in registers
    assert 2 * held * config.shared_bytes(2) // config.stages <= TARGETS[arch].shared_bytes


def test_gemms_are_not_specialised_on_the_number_of_rows():
    weight = torch.empty(4096, 1024, dtype=torch.bfloat16)
    one, many = (
        specializations(
            "sm_90", linear, "linear_gelu", torch.empty(batch, 1025, 1024, dtype=torch.bfloat16), weight, None
        )
        for batch in (1, 16)
    )
    assert one == many


def test_kernels_are_not_specialised_on_the_number_of_rows():
    """16 images and 1 take the same kernel: their bits cannot differ by what a compiler makes of divisibility."""
    weight = torch.empty(1024, dtype=torch.bfloat16)
    one, many = (
        specializations("sm_90", rms_norm, torch.empty(batch, 1025, 1024, dtype=torch.bfloat16), weight, 1e-6, "fused")
        for batch in (1, 16)
    )
    assert one == many


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("kernel", ["forward", "grad_q", "grad_kv"])
def test_tiles_in_flight_fit_the_targets_shared_memory(arch, kernel):
    target = TARGETS[arch]
    for head_dim in (64, 80, 128):
        for itemsize in (2, 4):
            config = AttentionConfig.rule(kernel, head_dim, itemsize, target)
            assert config.shared_bytes(head_dim, itemsize, target) <= target.shared_bytes or config.stages == 1


def test_backward_of_wide_heads_gives_both_warp_groups_their_own_rows():
    """wgmma takes 64 rows a warp group: of 64 x 64 tiles two groups compute the same, twice the products needed."""
    for kernel in ("grad_q", "grad_kv"):
        config = AttentionConfig.rule(kernel, 128, 2, TARGETS["sm_90"])
        assert config.rows >= 64 * config.warps // 4


def test_families_of_matrix_instructions():
    families = {name: target.matrix_instructions for name, target in TARGETS.items()}
    assert families == {
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), "mma"),
        **{"sm_90": "wgmma", "sm_100": "tcgen05", "gfx1100": "wmma"},
        **dict.fromkeys(("gfx90a", "gfx942", "gfx950"), "mfma"),
    }


@pytest.mark.parametrize("kernel", ["norm_kernel", "attention_kernel"])
def test_a_quick_profile_says_the_same_of_what_it_reads(kernel):
    if kernel == "norm_kernel":
        found = specializations("sm_90", rms_norm, torch.empty(4, 384), torch.empty(384), 1e-6, "fused")
    else:
        heads = [torch.empty(1, 257, 2, 64, dtype=torch.bfloat16) for _ in range(3)]
        found = specializations("sm_90", attention, *heads, 0.125, None, None, None, None)
    (one,) = (KernelUse(each, [], 0.0, 0.0) for each in found)
    whole, quick = (profile(one, TARGETS["sm_90"], quick=each) for each in (False, True))
    if kernel == "norm_kernel":
        assert whole["global_16_byte_share"] is not None
        assert quick["global_16_byte_share"] is None, "it was not disassembled"
        whole |= {"global_16_byte_share": None}
    assert quick == whole
