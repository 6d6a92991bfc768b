"""Kernels started without the JIT are those that the JIT would start, with the same arguments."""

import os
import random
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from internvit.kernels.common import compiled, launch
from internvit.kernels.common.target import TARGETS
from internvit.kernels.tools.compile_only import CompileOnlyDriver, gpu_target
from internvit.ops.backends.registry import has_implementation
from internvit.ops.core.spec import SPECS, Inputs, Size
from tests.support.implementations import call, op_calls

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter has no JIT")


class Recorded(CompiledKernel):
    """Stands for a compiled kernel: notes the arguments it is started with."""

    def __init__(self, key, target, options):
        self.key = key
        self.metadata = SimpleNamespace(target=target, enable_fp_fusion=options.enable_fp_fusion)
        self.starts = []

    def _init_handles(self):
        pass

    function = packed_metadata = None

    @property
    def run(self):
        return lambda *given: self.starts.append(given)

    def launch_metadata(self, *_):
        return None


@pytest.fixture
def gpu(monkeypatch):
    """A driver of a GPU that is not there, whose JIT makes `Recorded` kernels; `gpu(name)` sets it."""

    def make(self, key, signature, device, constants, options, *_):
        kernel_cache, _, target, *_ = self.device_caches[device]
        kernel_cache[key] = Recorded(key, target, options)
        return kernel_cache[key]

    monkeypatch.setattr(JITFunction, "_do_compile", make)
    monkeypatch.setattr(compiled, "_compiled", {})
    before = driver._active
    yield lambda name: driver.set_active(CompileOnlyDriver(TARGETS[name]))
    driver._active = before


@triton.jit(do_not_specialize=["M"])
def probe(p_x, p_y, M, stride, eps, BLOCK: triton.language.constexpr, FLAG: triton.language.constexpr):
    pass


def draw(rng):
    """A launch of `probe`, near what the JIT specialises on: addresses, None, 1, divisibility by 16, width."""
    memory = torch.zeros(64, dtype=rng.choice((torch.float32, torch.bfloat16)))
    integers = (1, 2, 8, 15, 16, 17, 32, 48, 2**31 - 1, 2**31, 2**31 + 16)
    pointers = [memory[rng.choice((0, 1, 2, 4, 8, 16)) :], None, torch.nn.Parameter(memory[rng.choice((0, 1)) :])]
    args = (memory, rng.choice(pointers), rng.choice(integers), rng.choice(integers), rng.choice((1e-6, 1.0, 0.0, 1)))
    constants = {"BLOCK": rng.choice((16, 32)), "FLAG": rng.choice((True, False, "a"))}
    if rng.random() < 0.5:
        constants = dict(reversed(constants.items()))
    return args, constants, rng.choice((4, 8)), rng.choice((1, 2))


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_kernel_is_the_jits_choice(gpu, name):
    gpu(name)
    seed, repeated = torch.randint(2**31, ()).item(), 0
    for i in range(3000):
        args, constants, warps, stages = draw(random.Random(seed + i % 1000))  # each three times, in other memory
        repeated += compiled.key_of(probe, args, constants, warps, stages) in compiled._compiled
        given = compiled.start(probe, (1,), args, constants, warps, stages, warmup=True)
        expected = probe.run(*args, grid=(1,), warmup=True, **compiled.options(warps, stages), **constants)
        assert given is expected
    assert (repeated > 500) == (name == "sm_90"), repeated  # AMD's kernels follow from the storage's size too


def test_another_device_has_kernels_of_its_own(gpu):
    args = (torch.zeros(4), None, 4, 1, 1e-6)
    kernels = []
    for name in ("sm_80", "sm_90"):
        gpu(name)
        for _ in range(2):
            kernels.append(compiled.start(probe, (1,), args, {"BLOCK": 16, "FLAG": True}, 4, 1))
    assert kernels[0] is kernels[1]
    assert kernels[2] is kernels[3]
    assert kernels[0].metadata.target == gpu_target(TARGETS["sm_80"]) != kernels[2].metadata.target


def test_hooks_and_unknown_arguments_go_to_the_jit(gpu, monkeypatch):
    gpu("sm_90")
    seen, args, constants = [], (torch.zeros(4), None, 4, 1, 1e-6), {"BLOCK": 16, "FLAG": True}
    compiled.start(probe, (1,), args, constants, 4, 1)
    monkeypatch.setattr(probe, "pre_run_hooks", [lambda *_, **__: seen.append(1)])
    compiled.start(probe, (1,), args, constants, 4, 1)
    assert seen == [1]
    monkeypatch.undo()
    assert compiled.key_of(probe, (*args[:-1], True), constants, 4, 1) is None
    assert compiled.key_of(probe, (*args[:2], 2**31, *args[3:]), constants, 4, 1) is None


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if s.name == n])
def test_launches_of_every_op_are_started_with_the_jits_arguments(gpu, name):
    """Each twice: what the JIT hands to the compiled kernel, and what that gets without the JIT."""
    gpu("sm_90")
    arguments = next(iter(SPECS[name].examples.values()))(Inputs(Size(1, 4, 2, 64), dtype=torch.bfloat16))
    with launch.record(TARGETS["sm_90"]) as recorded:
        for made in op_calls(SPECS[name], arguments):
            if has_implementation(made.op.name, "triton"):
                call(made.op.name, "triton", *made.raw_args)
    for one in recorded:
        for _ in range(2):
            kernel = compiled.start(one.kernel, one.grid, one.args, one.constants, one.num_warps, one.num_stages)
        by_jit, found = kernel.starts[-2:]
        assert found[:3] == by_jit[:3] == (*one.grid, 1, 1)[:3]
        assert [*map(identity, found)] == [*map(identity, by_jit)]
    assert recorded or name in ("qk_norm_attention", "qk_norm_attention_qkvpacked", "linear_layer_scale")


def identity(argument):
    return id(argument) if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_products_are_added_with_one_rounding_in_every_triton(gpu, name, monkeypatch):
    """Triton 3.10 is to add with two where nobody asks."""
    monkeypatch.setattr(triton.knobs.language, "default_fp_fusion", False)
    gpu(name)
    kernel = compiled.start(probe, (1,), (torch.zeros(4), None, 4, 1, 1e-6), {"BLOCK": 16, "FLAG": True}, 4, 1)
    assert kernel.metadata.enable_fp_fusion
