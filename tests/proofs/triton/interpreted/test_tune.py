"""`internvit.kernels.tools.tune` from its arguments to a file the package reads, with a clock that is not one."""

import dataclasses
import json

import pytest
import torch

from internvit import InternViTConfig
from internvit.benchmarks.harness import tune_backends
from internvit.kernels.attention.config import AttentionConfig, attention_config
from internvit.kernels.common import config as configs
from internvit.kernels.common.rows import FOLLOWERS, RowConfig, row_config
from internvit.kernels.common.target import INTERPRETER
from internvit.kernels.gelu import gelu_config
from internvit.kernels.linear import LinearConfig, linear_config
from internvit.kernels.tools import tune
from internvit.numerics import relative_error
from internvit.ops.backends import flash, registry
from internvit.ops.core.registration import OPS

CACHED = (configs._tuned, row_config, attention_config, gelu_config, linear_config)
IS_AS_EXACT = tune_backends._is_as_exact
TINY = {
    "image_size": 56,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
LAYER_NORM = {"norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}


def few(config, pruned=False):
    if isinstance(config, RowConfig):
        return iter([RowConfig(2, 2), RowConfig(4, 1)])
    if isinstance(config, AttentionConfig) and config.columns:
        return iter([AttentionConfig(32, 16, 4, 1), AttentionConfig(16, 32, 4, 2)])
    if isinstance(config, LinearConfig):
        return iter([LinearConfig(32, 64, 16, 4, 2)])
    return iter([])


@pytest.fixture
def rehearsal(tmp_path, monkeypatch):
    """Small models on the CPU, a few candidates, and a clock on which the last candidate is the fastest."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    models = InternViTConfig(**TINY), InternViTConfig(**TINY, **LAYER_NORM)
    for name, value in {"DEVICE": "cpu", "MODELS": models, "BATCH": 1, "WIDE": (56, 70), "candidates": few}.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune, "measure", lambda calls, device: {key: 1.0 - 0.1 * i for i, key in enumerate(calls)})
    monkeypatch.setattr(tune_backends, "_is_as_exact", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the interpreter")
    for cached in CACHED:
        cached.cache_clear()
    yield configs.tuned_files(INTERPRETER)[0]
    for cached in CACHED:
        cached.cache_clear()


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["tune", *map(str, arguments)])
    tune.main()


@pytest.mark.sampled(4)
def test_what_tune_writes_is_what_the_kernels_take(rehearsal, monkeypatch, capsys):
    run(monkeypatch, "--out", rehearsal)
    for cached in CACHED:
        cached.cache_clear()
    written = json.loads(rehearsal.read_text())
    assert {"target", "device", "torch", "triton", "configs", "backends"} == set(written)
    by_element = {"gelu", "gelu_backward", "gelu_quant", "per_token_quant"}
    row_ops = {name for name, op in OPS.items() if "cuda" in op.compiled} - by_element
    row_ops = {name for name in row_ops if name.removesuffix("_backward") not in FOLLOWERS}
    attention = {f"attention_{kernel}" for kernel in ("forward", "grad_q", "grad_kv")}
    assert set(written["configs"]) == row_ops | attention | {"linear_gelu", "linear_layer_scale"}
    assert linear_config("linear_gelu", 32, 64, torch.bfloat16, INTERPRETER) == LinearConfig(32, 64, 16, 4, 2)
    assert linear_config("linear_gelu", 64, 32, torch.bfloat16, INTERPRETER) == LinearConfig.rule(
        64, 32, 2, INTERPRETER
    )
    named = configs.TunedBackend("sdpa", "sdpa")  # the last that is timed is the fastest
    assert configs.tuned_backend("qk_norm_attention", "D=16,bytes=2", INTERPRETER) == named
    assert configs.tuned_backend("qk_norm_attention", "D=64,bytes=2", INTERPRETER) is None
    assert row_config("layer_norm_backward", 32, INTERPRETER) == RowConfig(4, 1)
    assert row_config("layer_norm_backward", 64, INTERPRETER) == RowConfig.rule(64)
    for kernel in ("forward", "grad_q", "grad_kv"):
        assert attention_config(kernel, 16, torch.bfloat16, INTERPRETER) == AttentionConfig(16, 32, 4, 2)
    assert "is not read from where it is" not in capsys.readouterr().out


@pytest.mark.sampled(4)
def test_a_wrong_candidate_is_not_taken_and_a_file_elsewhere_is_named(rehearsal, tmp_path, monkeypatch, capsys):
    outputs = tune._outputs

    def wrong(call, config):  # as if the kernel were broken for tiles of four rows
        return [t + (config.rows == 4) for t in outputs(call, config)]

    monkeypatch.setattr(tune, "_outputs", wrong)
    run(monkeypatch, "--out", tmp_path / "elsewhere.json", "--only", "qk_norm_backward")
    written = json.loads((tmp_path / "elsewhere.json").read_text())["configs"]
    assert written == {"qk_norm_backward": {"C=32": {"rows": 2, "warps": 2}}}
    assert f"put it at {rehearsal}" in capsys.readouterr().out


@pytest.mark.sampled(4)
def test_two_percent_are_needed(rehearsal, monkeypatch):
    monkeypatch.setattr(tune, "measure", lambda calls, device: {key: 1.0 - 0.005 * i for i, key in enumerate(calls)})
    run(monkeypatch, "--out", rehearsal, "--only", "qk_norm")
    assert json.loads(rehearsal.read_text())["configs"] == {}


@pytest.mark.sampled(2)
def test_a_run_that_is_cut_short_keeps_what_it_measured(rehearsal, monkeypatch):
    best = tune.best

    def third_fails(*args):
        if rehearsal.exists() and sum(map(len, json.loads(rehearsal.read_text())["configs"].values())) == 2:
            raise KeyboardInterrupt
        return best(*args)

    monkeypatch.setattr(tune, "best", third_fails)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, "--out", rehearsal)
    assert len(json.loads(rehearsal.read_text())["configs"]) == 2


def test_a_configuration_serves_attention_with_qk_norm_and_without(rehearsal):
    calls = tune.model_calls(tune.MODELS[0], torch.bfloat16, "cpu")
    attention = calls["attention_grad_kv", "D=16,bytes=2"]
    assert {call.args[6] is None for call in attention} == {True, False}  # rstd_k
    assert len({call.args[0].shape[1] for call in attention}) == 2  # tokens


FORWARD, TRAINING = ("forward", "triton"), ("training", "triton")


def faster_backend(measure, configs=None):
    """On a CPU `sdpa` stands in for a library."""
    return tune_backends.faster_backend(tune.MODELS[0], torch.bfloat16, "cpu", 1, measure, configs or {})


@pytest.mark.parametrize(
    ("fused", "named"),
    [({FORWARD: 2.0, TRAINING: 2.0}, True), ({FORWARD: 2.0}, False), ({FORWARD: 1.01, TRAINING: 2.0}, False)],
)
def test_a_library_has_to_be_faster_in_forward_and_in_training(fused, named, rehearsal):
    computed = []

    def measure(calls, device):
        computed.extend(call() for call in calls.values())
        return {key: fused.get(key, 1.0) for key in calls}

    choice, why = faster_backend(measure)
    assert choice == (configs.TunedBackend("sdpa", "sdpa") if named else None)
    assert "forward " in why
    (out, other), (results, others) = computed[:2], computed[2:]
    for a, b in zip((out, *results), (other, *others), strict=True):
        assert relative_error(a, b) < 0.1


def test_a_library_that_is_less_exact_is_not_named(rehearsal, monkeypatch):
    results = tune_backends._results

    def coarser(inputs, call):
        wrong = getattr(call, "keywords", {}).get("backend") == "sdpa"
        return [t * (1.1 if wrong else 1) for t in results(inputs, call)]

    monkeypatch.setattr(tune_backends, "_results", coarser)
    monkeypatch.setattr(tune_backends, "_is_as_exact", IS_AS_EXACT)
    assert faster_backend(None) == (None, "sdpa is less exact")


def test_the_library_is_timed_beside_the_tuned_kernel(rehearsal):
    taken = []

    def measure(calls, device):
        taken.append(attention_config("forward", 16, torch.bfloat16, INTERPRETER))
        return dict.fromkeys(calls, 1.0)

    tuned = {"attention_forward": {"D=16,bytes=2": {"rows": 16, "columns": 32, "warps": 4, "stages": 2}}}
    faster_backend(measure, tuned)
    assert taken == [AttentionConfig(16, 32, 4, 2)]
    rule = AttentionConfig.rule("forward", 16, 2, INTERPRETER)
    assert attention_config("forward", 16, torch.bfloat16, INTERPRETER) == rule


def test_a_backward_that_is_not_deterministic_is_timed_and_not_chosen(rehearsal, monkeypatch):
    available = dataclasses.replace(
        registry.BACKENDS["flash"], unavailable_reason=lambda: None, unsupported_reason=lambda *_: None
    )
    monkeypatch.setitem(registry.BACKENDS, "flash", available)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for library in flash.LIBRARIES:
        monkeypatch.setattr(flash, "library_of", lambda index, head_dim, library=library: library)
        found = tune_backends.library_of("flash", 128, torch.bfloat16, "cuda")
        assert found == (library.name, library.name != "cuDNN")
    monkeypatch.setattr(tune_backends, "library_of", lambda *_: found)
    choice, why = faster_backend(lambda calls, device: {key: 1.0 + (key[1] == "triton") for key in calls})
    assert choice is None
    assert "1.000 ms cuDNN, whose backward is not deterministic" in why


def test_a_library_that_fails_does_not_end_tuning(rehearsal, monkeypatch):
    def fails(calls, device):
        raise RuntimeError("CUDA error: planted")

    assert faster_backend(fails) == (None, "beside sdpa: RuntimeError: CUDA error: planted")
    monkeypatch.setattr(tune_backends, "library_of", lambda *_: None)
    assert faster_backend(fails) == (None, "no library runs here")
