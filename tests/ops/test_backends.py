import concurrent.futures
import dataclasses
import subprocess
import sys

import numpy
import pytest
import torch

import internvit
from internvit import ops
from internvit.ops.backends import registry
from internvit.ops.core import select as backends
from tests.support.choices import forget_choices


def test_context_function_and_argument() -> None:
    assert backends.requested() == "auto"
    with internvit.backend("reference"):
        assert backends.requested() == "reference"
        with internvit.backend("sdpa"):
            assert backends.requested() == "sdpa"
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"
    internvit.set_backend("reference")
    assert backends.requested() == "reference"
    internvit.set_backend("auto")
    assert backends.requested() == "auto"


def test_the_process_backend_is_every_threads_and_a_context_its_own() -> None:
    def requested_elsewhere() -> str:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(backends.requested).result()

    with internvit.backend("reference"):
        assert requested_elsewhere() == "auto"
    internvit.set_backend("reference")
    try:
        assert requested_elsewhere() == "reference"
        with internvit.backend("sdpa"):
            assert backends.requested() == "sdpa"
    finally:
        internvit.set_backend("auto")


def test_a_context_is_entered_again_and_left_in_any_order() -> None:
    chosen, other = internvit.backend("reference"), internvit.backend("sdpa")
    with chosen, chosen:
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"
    chosen.__enter__()
    other.__enter__()
    chosen.__exit__()
    assert backends.requested() == "sdpa"
    other.__exit__()
    assert backends.requested() == "auto"


def test_a_context_that_is_never_entered_says_so(caplog) -> None:
    with caplog.at_level("WARNING", logger="internvit"):
        internvit.backend("reference")
    assert "chose nothing" in caplog.text


def test_an_attention_only_backend_leaves_other_ops_to_auto() -> None:
    x = torch.randn(2, 8)
    auto = backends.resolve("rms_norm", x)
    with internvit.backend("sdpa"):
        assert backends.resolve("rms_norm", x) == auto
        assert backends.resolve("attention", x) == "sdpa"


def test_float64_runs_on_the_truth() -> None:
    assert backends.resolve("rms_norm", torch.ones(1, dtype=torch.float64)) == "reference"


def test_unknown_and_missing_backends_say_what_to_do(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"expected one of auto, reference, .* got 'tpu'"):
        internvit.backend("tpu")
    if registry.BACKENDS["flash"].unavailable_reason() is not None:
        with pytest.raises(RuntimeError, match=r"backend 'flash' is not available: .*pip install 'internvit\[flash\]'"):
            internvit.backend("flash")
    with pytest.raises(ValueError, match="backend 'sdpa' does not implement this op"):
        ops.rms_norm(torch.ones(2, 8), torch.ones(8), backend="sdpa")


def test_auto_says_once_what_it_passed_over_and_why(caplog) -> None:
    forget_choices()
    half = torch.ones(1, 8, dtype=torch.float64)
    with caplog.at_level("INFO", logger="internvit"):
        ops.rms_norm(half, half[0])
        ops.rms_norm(half, half[0])
    passed_over = [r.getMessage() for r in caplog.records if r.getMessage().startswith("rms_norm runs on backend")]
    assert len(passed_over) == 1
    assert "cpu: " in passed_over[0]


def test_a_compiled_function_follows_the_context() -> None:
    torch._dynamo.reset()
    x, weight = torch.randn(2, 8), torch.randn(8)
    names = []

    def spy(graph, inputs):
        names.extend(node.args[-1] for node in graph.graph.nodes if "internvit.rms_norm" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda x: ops.rms_norm(x, weight), backend=spy, fullgraph=True)
    compiled(x)
    with internvit.backend("reference"):
        compiled(x)
    auto = backends.resolve("rms_norm", x)
    assert names == [auto, "reference"] if auto != "reference" else names[0] == "reference"


def test_environment_variable() -> None:
    code = "from internvit.ops.core import select; print(select.requested())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"INTERNVIT_BACKEND": "reference"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "reference"


def test_every_backend_is_plugged_in_by_registration(monkeypatch) -> None:
    seen = []

    def fake(x, weight, eps, rounding):
        seen.append(rounding)
        return torch.zeros_like(x), x.new_zeros(x.shape[:-1], dtype=torch.float32)

    for name in ("triton", "cpu", "cuda"):
        plugged = dataclasses.replace(
            registry.BACKENDS[name],
            module=None,
            unavailable_reason=lambda: None,
            unsupported_reason=lambda device, dtype, head_dim: None,
        )
        monkeypatch.setitem(registry.BACKENDS, name, plugged)
        monkeypatch.setitem(registry._IMPLEMENTATIONS, ("rms_norm", name), fake)
        forget_choices()
        y = ops.rms_norm(torch.ones(2, 8), torch.ones(8), backend=name)
        assert not y.any()
    assert seen == ["fused"] * 3
    forget_choices()


def test_arguments_that_are_no_tensors_are_named() -> None:
    with pytest.raises(TypeError, match=r"rms_norm: x must be a torch.Tensor, got list"):
        ops.rms_norm([1.0, 2.0], torch.ones(2))
    with pytest.raises(TypeError, match=r"attention: v must be a torch.Tensor, got ndarray"):
        ops.attention(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8), numpy.ones((1, 2, 1, 8)))
