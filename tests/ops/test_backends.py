import subprocess
import sys

import pytest
import torch

import internvit
from internvit import ops
from internvit.ops.core import select as backends


def test_context_function_and_argument() -> None:
    assert backends.requested() == "auto"
    with internvit.backend("reference"):
        assert backends.requested() == "reference"
        with internvit.backend("sdpa"):
            assert backends.requested() == "sdpa"
        assert backends.requested() == "reference"
    assert backends.requested() == "auto"
    chosen = internvit.backend("reference")
    assert backends.requested() == "reference"
    chosen.__exit__()
    assert backends.requested() == "auto"


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
    if backends.BACKENDS["flash"].missing() is not None:
        with pytest.raises(RuntimeError, match=r"backend 'flash' is not available: .*pip install 'internvit\[flash\]'"):
            internvit.backend("flash")
    with pytest.raises(ValueError, match="backend 'sdpa' does not implement this op"):
        ops.rms_norm(torch.ones(2, 8), torch.ones(8), backend="sdpa")


def test_auto_says_once_what_it_passed_over_and_why(caplog) -> None:
    backends._resolve_once.cache_clear()
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
    code = "from internvit.ops import backends; print(backends.requested())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"INTERNVIT_BACKEND": "reference"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "reference"


def test_every_backend_kind_runs_one_op(monkeypatch) -> None:
    """The plug: a Python module for triton, a compiled library for cpu and cuda, found by the op's name alone."""
    seen = []

    def fake(op: str):
        def run(x, weight, eps, rounding):
            seen.append(op)
            return torch.zeros_like(x), x.new_zeros(x.shape[:-1], dtype=torch.float32)

        return run if op == "rms_norm" else None

    import dataclasses

    for name in ("triton", "cpu", "cuda"):
        plugged = dataclasses.replace(
            backends.BACKENDS[name], find=fake, missing=lambda: None, rejects=lambda device, dtype, head_dim: None
        )
        monkeypatch.setitem(backends.BACKENDS, name, plugged)
        for cache in (backends.implementation, backends._resolve_once):
            cache.cache_clear()
        y = ops.rms_norm(torch.ones(2, 8), torch.ones(8), backend=name)
        assert not y.any()
    assert seen == ["rms_norm"] * 3
    for cache in (backends.implementation, backends._resolve_once):
        cache.cache_clear()
