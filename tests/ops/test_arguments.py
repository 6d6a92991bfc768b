"""One wrong argument at a time: the registered op on every backend, and its fake, agree with the op's rules.

The rules agree with the compiled libraries' own checks in tests/proofs/native/test_bad_arguments.py.
"""

import functools
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import internvit
from internvit.ops.backends.registry import BACKENDS, backends_for
from internvit.ops.core.registration import OPS
from internvit.ops.core.spec import INFERENCE_SPECS, SPECS, TINY, Inputs
from tests.ops.cases import CASES
from tests.proofs.native.bad_arguments import wrong_tensors, wrong_values
from tests.support import ROOT
from tests.support.implementations import OpCall, op_calls

Outcome = str | None
"""The error's text, None without one."""


@functools.cache
def calls() -> list[OpCall]:
    """The registered ops of every case, forward and backward, with valid arguments."""
    return [call for c in CASES for call in op_calls(c.spec, c.spec.examples[c.variant](Inputs(TINY)))]


def outcome(function: Any, args: Any) -> Outcome:
    try:
        function(*args)
    except (ValueError, RuntimeError, TypeError) as error:
        return str(error) or type(error).__name__
    return None


def fake_outcome(op: Any, args: Any) -> Outcome:
    with FakeTensorMode() as mode:
        return outcome(op, [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args])


def wrong(argument: Any, value: Any) -> list[tuple[str, Any]]:
    optional = "Optional" in str(argument.type)
    if isinstance(value, Tensor) and value.numel():
        return list(wrong_tensors(value, optional, written=False))
    if argument.name == "scale":
        return [("NaN", float("nan")), ("infinite", float("inf"))]
    return list(wrong_values(argument.name, value))


def backends_of(call: OpCall) -> list[str]:
    implemented_as = {spec.op: spec.implemented_as for spec in SPECS.values()}
    name = call.op.name.removesuffix("_backward")
    names = [a.name for a in call.op.overload._schema.arguments]
    folded = name == "attention" and isinstance(call.args[names.index("rstd_k")], Tensor)
    varlen = "cu_seqlens" in names and isinstance(call.args[names.index("cu_seqlens")], Tensor)
    return [b for b in backends_for(implemented_as[name], "cpu", torch.float32, 8, folded, varlen) if b != "triton"]


def assert_agreement(call: OpCall, index: int, what: str, value: Any, backend: str) -> None:
    arguments = [a.name for a in call.op.overload._schema.arguments[:-1]]
    name, args = arguments[index], (*call.args[:index], value, *call.args[index + 1 :], backend)
    told = outcome(call.op.check, args)
    public, fake = outcome(call.op.overload, args), fake_outcome(call.op.overload, args)
    label = f"{call.op.name} on {backend}, {name} {what}"
    if told is None and public is not None and "cu_seqlens" in arguments:
        # The values of cu_seqlens and cu_seqlens_k, which the rules do not read.
        assert re.search("cu_seqlens(_k)? must|max_seqlen(_k)? must be at least", public), f"{label}: {public}"
        return
    assert (public is None) == (told is None), f"{label}: the rules say {told!r}, the op {public!r}"
    assert (fake is None) == (told is None), f"{label}: the rules say {told!r}, the fake {fake!r}"
    if told is None:
        return
    # The others are compared with the first tensor: where that one is wrong, another may be named.
    first = name in (arguments[0], "x", "q", "branch", "residual_out", "pre_activation", "grad_normed")
    assert any(n in told for n in (name, "backend", *(arguments if first else ()))), f"{label}: {told}"
    assert told in public, f"{label}: {public}"
    assert told in fake, f"{label}: {fake}"


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_op_fake_and_rules_agree_on_one_wrong_argument(data: st.DataObject) -> None:
    call = calls()[data.draw(st.integers(0, len(calls()) - 1))]
    arguments = zip(call.op.overload._schema.arguments[:-1], call.args, strict=True)
    changes = [(i, *change) for i, (argument, value) in enumerate(arguments) for change in wrong(argument, value)]
    index, what, value = changes[data.draw(st.integers(0, len(changes) - 1))]
    assert_agreement(call, index, what, value, data.draw(st.sampled_from(backends_of(call))))


@pytest.mark.parametrize("backend", [n for n, b in BACKENDS.items() if n != "flash" and b.unavailable_reason() is None])
def test_a_registered_op_refuses_a_backend_that_cannot_take_it(backend: str) -> None:
    """sdpa's attention has no QK-norm inside: weights given to it were ignored."""
    spec = SPECS["attention"]
    call = op_calls(spec, spec.examples["qk_norm"](Inputs(TINY)))[0]
    args = (*call.args, backend)
    public = outcome(call.op.overload, args)
    assert (public is None) == (backend in backends_for("attention", "cpu", torch.float32, 8, folded=True))
    assert (fake_outcome(call.op.overload, args) is None) == (public is None)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_short_weight_is_never_broadcast(gradient: bool, backend: str) -> None:
    x = torch.randn(2, 5, 16, requires_grad=gradient)
    for weight in (torch.randn(1), torch.randn(()), torch.randn(15), torch.randn(1, 16)):

        def norm(x: Tensor, weight: Tensor = weight) -> Tensor:
            return torch.ops.internvit.rms_norm(x, weight, 1e-6, "fused", backend)[0]

        with pytest.raises((ValueError, RuntimeError), match="rms_norm: weight must have shape"):
            norm(x)
        with pytest.raises((ValueError, RuntimeError), match="rms_norm: weight must have shape"):
            torch.func.jvp(norm, (x,), (x,))


def test_every_registered_op_is_fuzzed() -> None:
    """Those of inference too, in tests/proofs/native/test_bad_arguments.py, as raw ops of the library."""
    assert {c.op.name for c in calls()} | INFERENCE_SPECS.keys() == set(OPS)


@pytest.mark.parametrize(
    "trace",
    [
        lambda module, args: torch.export.export(module, args),
        lambda module, args: torch.compile(module, backend="eager", fullgraph=True)(*args),
    ],
    ids=["export", "compile"],
)
def test_a_wrong_argument_fails_when_a_program_is_traced(trace: Any) -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return torch.ops.internvit.rms_norm(x, weight, 1e-6, "fused", "cpu")[0]

    with pytest.raises((ValueError, RuntimeError), match=r"rms_norm: weight must have shape \[16\]"):
        trace(Norm(), (torch.randn(2, 5, 16), torch.randn(15)))


@pytest.mark.sampled(2)
def test_a_registered_op_may_be_fake_before_anything_runs() -> None:
    """As in a program that is compiled first: the backend is then loaded inside a fake op."""
    code = """
import torch, internvit
from torch._subclasses.fake_tensor import FakeTensorMode
def norm(x, weight): return torch.ops.internvit.rms_norm(x, weight, 1e-6, "fused", "cpu")[0]
with FakeTensorMode():
    assert norm(torch.randn(3, 16), torch.randn(16)).shape == (3, 16)
assert norm(torch.randn(3, 16), torch.randn(16)).isfinite().all()
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_residual_stream_in_float32_beside_a_float64_branch() -> None:
    """The backend is chosen by the branch: the compiled library has no float64."""
    residual, branch = torch.randn(2, 5, 16), torch.randn(2, 5, 16, dtype=torch.float64)
    out = internvit.ops.layer_scale_residual(residual, branch)
    torch.testing.assert_close(out, (residual + branch).float())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_attention_takes_statistics_in_float64(backend: str) -> None:
    arguments = SPECS["attention"].examples["qk_norm"](Inputs(TINY))
    wide = arguments | {n: arguments[n].double() for n in ("rstd_q", "rstd_k")}
    out = internvit.ops.attention(**wide, backend=backend)
    torch.testing.assert_close(out, internvit.ops.attention(**arguments, backend=backend))
