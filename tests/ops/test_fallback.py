"""A kernel that cannot be compiled or started: `auto` takes the next backend, a backend asked for by name says why.

Triton's kernels are specialised and compiled for a GPU that is not there, on CPU tensors; what is planted in one of
them fails as it would there. A kernel that is not planted computes nothing, so that only results of another backend
can be right.
"""

import contextlib
import dataclasses
import logging
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import internvit
from internvit.ops.backends import registry
from internvit.ops.backends.registry import implements
from internvit.ops.core import fallback
from internvit.ops.core.fallback import KernelStartError
from internvit.ops.core.spec import SPECS, TINY, Inputs, differentiable
from tests.support.choices import forget_choices

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

from internvit.kernels import norm  # noqa: E402
from internvit.kernels.common.launch import Launch  # noqa: E402
from internvit.kernels.common.target import TARGETS  # noqa: E402
from internvit.kernels.tools.compile_only import Specialization, specializing  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process, not compiled"
)


def does_not_compile():
    raise triton.compiler.errors.CompilationError("def kernel():\n    return 1", None, "planted: no such attribute")


def wants_too_much_shared_memory():
    raise OutOfResources(200_000, 101_376, "shared memory")


def is_refused_by_ptxas():
    raise PTXASError("planted: Instruction 'wgmma' not supported on .target 'sm_90'")


def finds_no_c_compiler():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nowhere")
        patch.delenv("CC", raising=False)
        patch.setattr(triton.knobs.build, "impl", None)
        triton.runtime.build._build("probe", "probe.c", "/nowhere", [], [], [], [])


def finds_no_kernel_image():
    raise RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device")


START_FAILURES = [
    does_not_compile,
    wants_too_much_shared_memory,
    is_refused_by_ptxas,
    finds_no_c_compiler,
    finds_no_kernel_image,
]


@contextlib.contextmanager
def triton_for_cpu_tensors(monkeypatch, fails, target="sm_90"):
    """Inside, `auto` takes Triton for CPU tensors; a launch of a kernel for which `fails` returns a function calls it.

    Yields the names of the kernels that were launched.
    """
    accepting = dataclasses.replace(
        registry.BACKENDS["triton"], unavailable_reason=lambda: None, unsupported_reason=lambda *_: None
    )
    monkeypatch.setitem(registry.BACKENDS, "triton", accepting)
    monkeypatch.setitem(fallback.AUTO_ORDER, "cpu", ("triton", "sdpa", "reference"))
    launched = []

    def receive(one: Launch, specialization: Specialization) -> None:
        launched.append(specialization.function)
        plant = fails(specialization.function)
        if plant:
            plant()

    forget_choices()
    try:
        with specializing(TARGETS[target], receive):
            yield launched
    finally:
        forget_choices()


def forward_and_backward(spec, arguments, backend=None):
    leaves = {n: t.detach().clone().requires_grad_() for n, t in differentiable(arguments).items()}
    outputs = spec.run({**arguments, **leaves}, backend)
    grads = torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(t) for t in outputs])
    return outputs, grads


CASES = [
    pytest.param(spec, example, id=f"{name} {variant}".strip())
    for name, spec in SPECS.items()
    for variant, example in spec.examples.items()
]


def lines_of(caplog):
    return [r.getMessage() for r in caplog.records if "does not start" in r.getMessage()]


@pytest.mark.parametrize(("spec", "example"), CASES)
def test_every_op_falls_back_forward_and_backward(spec, example, generator, monkeypatch, caplog):
    arguments = example(Inputs(TINY, generator))
    expected = forward_and_backward(spec, arguments, "reference")
    with triton_for_cpu_tensors(monkeypatch, lambda kernel: does_not_compile) as launched:
        with caplog.at_level(logging.WARNING, "internvit"):
            for _ in range(2):
                actual = forward_and_backward(spec, arguments)
        # sdpa, which attention falls to, takes its QK-norm by `auto`: that fails for itself.
        tried = {spec.op, "qk_norm"} if spec.op.startswith("qk_norm_attention") else {spec.op}
        assert len(launched) <= len(tried), "a backend that failed is not tried again for the same calls"
        said = lines_of(caplog)
        assert len(said) == len(launched)
        for line in said:
            assert line.split(": a kernel of backend 'triton' does not start")[0] in tried
            assert "CompilationError: planted: no such attribute" in line
    for a, e in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plant", START_FAILURES, ids=lambda plant: plant.__name__)
def test_each_kind_of_failure_falls_back(plant, monkeypatch, caplog):
    x, weight = torch.randn(3, 64), torch.randn(64)
    with triton_for_cpu_tensors(monkeypatch, lambda kernel: plant), caplog.at_level(logging.WARNING, "internvit"):
        y = internvit.ops.rms_norm(x, weight)
        assert torch.equal(y, internvit.ops.rms_norm(x, weight, backend="reference"))
        assert len(lines_of(caplog)) == 1
        with pytest.raises(KernelStartError, match="rms_norm: a kernel of backend 'triton' cannot be compiled") as info:
            internvit.ops.rms_norm(x, weight, backend="triton")
        assert info.value.__cause__ is not None


@triton.jit
def broken_kernel(p_x, C: tl.constexpr):
    tl.store(p_x, tl.no_such_function(C))


def test_a_real_compilers_error(monkeypatch, caplog):
    """A kernel that Triton's own compiler refuses, launched in place of the norm's."""
    x, weight = torch.randn(3, 64), torch.randn(64)

    def receive(one, specialization):
        if specialization.function == "broken_kernel":
            specialization.compile(TARGETS["sm_90"])

    def broken(x, weight, eps, rounding):
        norm.launch.run(broken_kernel, (1,), x, C=64, num_warps=1)

    with triton_for_cpu_tensors(monkeypatch, lambda kernel: None):
        registry.BACKENDS["triton"].find("rms_norm")
        monkeypatch.setitem(registry._IMPLEMENTATIONS, ("rms_norm", "triton"), broken)
        with specializing(TARGETS["sm_90"], receive), caplog.at_level(logging.WARNING, "internvit"):
            y = internvit.ops.rms_norm(x, weight)
    assert torch.equal(y, internvit.ops.rms_norm(x, weight, backend="reference"))
    assert "no_such_function" in lines_of(caplog)[0]


@pytest.mark.parametrize("watched", [False, True], ids=["eager", "under a dispatch mode"])
@pytest.mark.parametrize("rounding", ["fused", "reference"])
def test_backward_alone_falls_back_and_forward_stays(rounding, watched, monkeypatch, caplog):
    """Forward's outputs are Triton's, so what it would save is given by the reference; backward's kernels fail."""

    def fails(kernel):
        return does_not_compile if "backward" in kernel else None

    x, weight = torch.randn(2, 5, 64), torch.randn(64)
    spec, arguments = SPECS["rms_norm"], {"x": x, "weight": weight, "rounding": rounding}
    expected = forward_and_backward(spec, arguments, "reference")
    with triton_for_cpu_tensors(monkeypatch, fails) as launched, caplog.at_level(logging.WARNING, "internvit"):
        registry.BACKENDS["triton"].find("rms_norm")
        reference = registry._IMPLEMENTATIONS["rms_norm", "reference"]
        forwards = []
        monkeypatch.setitem(
            registry._IMPLEMENTATIONS, ("rms_norm", "triton"), lambda *args: forwards.append(1) or reference(*args)
        )
        for _ in range(2):
            with FlopCounterMode(display=False) if watched else contextlib.nullcontext():
                outputs, grads = forward_and_backward(spec, arguments)
        assert len(launched) == 1
        assert len(forwards) == 2, "forward keeps its backend"
        assert len(lines_of(caplog)) == 1
        assert lines_of(caplog)[0].startswith("rms_norm_backward: ")
        with pytest.raises(KernelStartError, match="rms_norm_backward: a kernel of backend 'triton'"):
            forward_and_backward(spec, arguments, "triton")
    for a, e in zip((*outputs, *grads), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, e)


def test_backward_of_folded_attention_takes_a_backend_that_folds(generator, monkeypatch):
    """sdpa would compare the forward's log-sum-exp with scores of rounded q_hat and k_hat."""
    spec = SPECS["qk_norm_attention_qkvpacked"]
    arguments = spec.examples[""](Inputs(TINY, generator))
    plain = {**arguments, "q_weight": None, "k_weight": None}
    taken = []
    for name in ("sdpa", "reference"):
        registry.BACKENDS[name].find("attention_backward")
        function = registry._IMPLEMENTATIONS["attention_backward", name]
        monkeypatch.setitem(
            registry._IMPLEMENTATIONS,
            ("attention_backward", name),
            lambda *args, name=name, function=function: taken.append(name) or function(*args),
        )
    with triton_for_cpu_tensors(monkeypatch, lambda k: does_not_compile if "delta" in k else None):
        forward_and_backward(spec, arguments)
        forward_and_backward(spec, plain)
    assert taken == ["reference", "sdpa"]


def test_a_failure_stays_with_its_width_and_dtype(monkeypatch):
    narrow, wide = torch.randn(3, 64), torch.randn(3, 128)
    with triton_for_cpu_tensors(monkeypatch, lambda kernel: does_not_compile) as launched:
        for x, tries in ((narrow, 1), (wide, 2), (narrow.bfloat16(), 3), (narrow[:2], 3), (wide[:1], 3)):
            internvit.ops.rms_norm(x, x[0])
            assert len(launched) == tries


def illegal_access():
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def wrong_argument():
    raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.")


@pytest.mark.parametrize("plant", [illegal_access, wrong_argument, no_memory], ids=lambda plant: plant.__name__)
@pytest.mark.parametrize("backward", [False, True])
def test_other_errors_surface(plant, backward, monkeypatch, caplog):
    spec, arguments = SPECS["rms_norm"], {"x": torch.randn(3, 64), "weight": torch.randn(64)}
    with triton_for_cpu_tensors(monkeypatch, lambda k: plant if ("backward" in k) == backward else None):
        with pytest.raises(Exception) as info:  # noqa: PT011 (which one is asserted)
            forward_and_backward(spec, arguments)
        with pytest.raises(Exception) as expected:  # noqa: PT011
            plant()
    assert type(info.value) is type(expected.value)
    assert str(info.value) == str(expected.value)
    assert not lines_of(caplog)


def test_an_illegal_access_that_loading_a_binary_reports_surfaces():
    """An earlier kernel's error comes out of whatever is called next, as of Triton's compiler while it loads."""
    code = "def load(): raise RuntimeError('Triton Error [CUDA]: an illegal memory access was encountered')"
    compiler = {"__name__": "triton.compiler.compiler"}
    exec(code, compiler)
    with pytest.raises(RuntimeError) as info:
        compiler["load"]()
    assert not fallback.is_start_failure(info.value)


def test_a_compiled_graph_names_what_did_not_start_and_a_call_before_settles_it(monkeypatch):
    x, weight = torch.randn(3, 64), torch.randn(64)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: internvit.ops.rms_norm(x, weight), backend="aot_eager", fullgraph=True)
    with triton_for_cpu_tensors(monkeypatch, lambda kernel: does_not_compile) as launched:
        with pytest.raises(KernelStartError, match=r"outside of torch\.compile"):
            compiled(x)
        internvit.ops.rms_norm(x, weight)
        torch._dynamo.reset()
        assert torch.equal(compiled(x), internvit.ops.rms_norm(x, weight, backend="reference"))
        assert len(launched) == 2


def test_another_backends_failure_falls_back_as_well(monkeypatch, caplog):
    """The `cuda` library has no code for every GPU."""
    monkeypatch.setitem(
        registry.BACKENDS, "plugged", dataclasses.replace(registry.BACKENDS["sdpa"], name="plugged", module=None)
    )
    monkeypatch.setitem(fallback.AUTO_ORDER, "cpu", ("plugged", "reference"))
    monkeypatch.setitem(registry._IMPLEMENTATIONS, ("gelu", "plugged"), None)

    @implements("gelu", "plugged")
    def gelu(x):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    forget_choices()
    x = torch.randn(3, 8)
    with caplog.at_level(logging.WARNING, "internvit"):
        assert torch.equal(internvit.ops.gelu(x), internvit.ops.gelu(x, backend="reference"))
    assert "backend 'plugged'" in lines_of(caplog)[0]
    forget_choices()
