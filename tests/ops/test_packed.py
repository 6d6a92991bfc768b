"""Attention of packed sequences: the bits of the images one by one, wrong cu_seqlens, and planted bugs."""

import dataclasses
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from internvit import ops
from internvit.numerics import product_violations, relative_error, sample
from internvit.ops.attention import SavedAttention
from internvit.ops.backends import registry
from internvit.ops.backends.registry import backends_for, implementation, usable
from internvit.ops.core.fallback import AUTO_ORDER
from internvit.ops.core.select import forget_resolved, resolve
from internvit.ops.core.sequences import Sequences
from internvit.ops.core.spec import SPECS, Inputs, Size
from tests.support import CPU_UNITS

HERE = [b for b in backends_for("attention", "cpu", torch.float32, 8, varlen=True) if b != "triton"]
backends = pytest.mark.parametrize("backend", HERE)
LENGTHS = [(7,), (1, 33, 0, 64, 5), (0, 97, 1), (40, 40, 40)]
lengths = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


def ends_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def images_of(x: Tensor, lengths: tuple[int, ...]) -> Iterator[Tensor]:
    return (image[None] for image in x.split(lengths) if len(image))


@pytest.fixture(params=CPU_UNITS)
def unit(request: Any) -> Iterator[str]:
    if registry.BACKENDS["cpu"].unavailable_reason() is not None:
        pytest.skip("the library internvit_cpu is not built")
    usable("cpu").find("attention")
    raw = torch.ops.internvit_cpu
    if request.param not in raw.instruction_sets().split():
        pytest.skip(f"this machine has no {request.param}")
    before = raw.use_instruction_set(request.param)
    yield request.param
    raw.use_instruction_set(before)


@lengths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 64), (3, 40)])
def test_an_image_has_the_same_bits_alone_and_packed(unit, lengths, dtype, heads, head_dim, generator) -> None:
    """Forward and the gradient of qkv, on any number of threads; QK-norm inside."""
    qkv = sample((sum(lengths), 3, heads, head_dim), "massive", dtype, generator).requires_grad_()
    weight = (1 + 0.3 * torch.randn(heads * head_dim, generator=generator)).to(dtype).requires_grad_()
    grad = sample((sum(lengths), heads, head_dim), "normal", dtype, generator)
    settings = {"q_weight": weight, "k_weight": weight, "backend": "cpu"}
    results = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        out = ops.qk_norm_attention_qkvpacked(qkv, **settings, cu_seqlens=ends_of(lengths))
        results.append((out, *torch.autograd.grad(out, (qkv, weight), grad)))
    torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))
    alone = [image.detach().requires_grad_() for image in images_of(qkv, lengths)]
    outs = [ops.qk_norm_attention_qkvpacked(image, **settings) for image in alone]
    grads = torch.autograd.grad(outs, alone, list(images_of(grad, lengths)))
    assert torch.equal(results[0][0], torch.cat(outs, 1)[0])
    assert torch.equal(results[0][1], torch.cat(grads, 1)[0])


def inputs(generator: torch.Generator, variant: str = "cu_seqlens") -> dict[str, Any]:
    made = SPECS["attention"].examples[variant](Inputs(Size(4, 33, 2, 16), generator))
    return made | {"max_seqlen": None}


def violations(backend: str, arguments: dict[str, Any], grad: Tensor) -> list[str]:
    """What forward and backward of `backend` break of the contract."""
    spec = SPECS["attention"]
    leaves = {n: t.detach().requires_grad_() for n, t in arguments.items() if n in ("q", "k", "v")}
    wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    out = ops.attention(**arguments | leaves, backend=backend)
    truth, eager = spec.formula(**arguments | wide), spec.formula(**arguments | leaves)
    broken = product_violations(out, truth, eager, 2.0)
    actual = torch.autograd.grad(out, list(leaves.values()), grad)
    expected = torch.autograd.grad(truth, list(wide.values()), grad.double())
    errors = (relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    return broken + [f"gradient {i}: {e:.1e}" for i, e in enumerate(errors) if not e < 3e-6]


def shifted(ends: Tensor) -> Tensor:
    """Each boundary one token late, where there is one."""
    return torch.cat([ends[:1], (ends[1:-1] + 1).clamp(max=int(ends[-1])), ends[-1:]])


BUGS: dict[str, Callable[[Tensor], Tensor]] = {
    "boundaries off by one": shifted,
    "no mask between sequences": lambda ends: ends[[0, -1]],
    "the last sequence is not there": lambda ends: torch.cat([ends[:-2], ends[-1:]]),
    "the lengths of the batch reversed": lambda ends: torch.cat([ends[:1], ends.diff().flip(0).cumsum(0).int()]),
}


@backends
@pytest.mark.parametrize("direction", ["attention", "attention_backward"])
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bugs_are_found(backend, direction, bug, generator, monkeypatch) -> None:
    arguments = inputs(generator)
    grad = torch.randn(arguments["q"].shape, generator=generator)
    real = implementation(direction, backend)

    def planted(*args: Any) -> Any:
        *others, last = args
        if direction == "attention":
            ends = BUGS[bug](last.cu_seqlens)
            return real(*others, Sequences(ends, int(ends.diff().max())))
        grad_out, saved = others
        assert isinstance(saved, SavedAttention)
        assert saved.sequences is not None
        ends = BUGS[bug](saved.sequences.cu_seqlens)
        return real(grad_out, saved._replace(sequences=Sequences(ends, int(ends.diff().max()))), last)

    if bug is not None:
        monkeypatch.setitem(registry._IMPLEMENTATIONS, (direction, backend), planted)
    found = violations(backend, arguments, grad)
    assert bool(found) == (bug is not None), found


@backends
def test_tokens_of_one_image_never_reach_another(backend, generator) -> None:
    """Huge values in all other images change nothing."""
    arguments = inputs(generator)
    ends = arguments["cu_seqlens"].tolist()
    out = ops.attention(**arguments, backend=backend)
    for start, end in pairwise(ends):
        others = {n: torch.full_like(arguments[n], 1e4) for n in "qkv"}
        for n, t in others.items():
            t[start:end] = arguments[n][start:end]
        changed = ops.attention(**arguments | others, backend=backend)
        assert torch.equal(changed[start:end], out[start:end])


@backends
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": [0, 3, 9]}, r"begin with 0 and end with 10 \(tokens\), got \[0, 3, 9\]"),
        ({"cu_seqlens": [1, 3, 10]}, "begin with 0"),
        ({"cu_seqlens": [0, 11, 10]}, "must not decrease"),
        ({"cu_seqlens": [0, -1, 10]}, "must not decrease"),
        ({"cu_seqlens": []}, r"must have shape \[B \+ 1\], got \[0\]"),
        ({"cu_seqlens": [[0, 10]]}, r"must have shape \[B \+ 1\]"),
        ({"max_seqlen": 6}, r"max_seqlen must be at least 7 \(the longest sequence\), got 6"),
        ({"max_seqlen": -1}, "max_seqlen must be an integer >= 0"),
        ({"cu_seqlens": None, "max_seqlen": 7}, r"q must have shape \[B, N, H, D\]|go together"),
        ({"q": (1, 10, 2, 8)}, r"q must have shape \[total, H, D\] beside cu_seqlens, got \[1, 10, 2, 8\]"),
        ({"k": (9, 2, 8)}, "k must have q's shape"),
    ],
)
def test_bad_sequences(backend, change, message) -> None:
    arguments: dict[str, Any] = {n: torch.ones(10, 2, 8) for n in "qkv"} | {"cu_seqlens": [0, 3, 10]} | change
    for n in "qkv":
        arguments[n] = torch.ones(arguments[n]) if isinstance(arguments[n], tuple) else arguments[n]
    if arguments["cu_seqlens"] is not None:
        arguments["cu_seqlens"] = torch.tensor(arguments["cu_seqlens"], dtype=torch.int32)
    valid = {n: torch.ones(10, 2, 8) for n in "qkv"} | {"cu_seqlens": torch.tensor([0, 3, 10], dtype=torch.int32)}
    ops.attention(**valid, max_seqlen=arguments.get("max_seqlen") and 7, backend=backend)  # values are read every time
    with pytest.raises(ValueError, match=message):
        ops.attention(**arguments, backend=backend)


def test_integers_of_another_size_are_refused() -> None:
    qkv = torch.ones(10, 3, 2, 8)
    with pytest.raises(ValueError, match=r"cu_seqlens must be torch.int32, got torch.int64"):
        ops.qk_norm_attention_qkvpacked(qkv, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(TypeError, match=r"cu_seqlens must be a torch\.Tensor, got list"):
        ops.qk_norm_attention_qkvpacked(qkv, cu_seqlens=[0, 10])


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 3, 9], "begin with 0 and end with 10"),
        ([0, 3, 2**30], "begin with 0 and end with 10"),
        ([-5, 3, 10], "begin with 0"),
        ([0, 2**30, 10], "not decrease"),
        ([0, -(2**30), 10], "not decrease"),
        ([], "shape"),
    ],
)
def test_raw_ops_read_and_write_nothing_outside(ends, message) -> None:
    if registry.BACKENDS["cpu"].unavailable_reason() is not None:
        pytest.skip("the library internvit_cpu is not built")
    usable("cpu").find("attention")
    raw, q = torch.ops.internvit_cpu, torch.ones(10, 2, 8)
    wrong = torch.tensor(ends, dtype=torch.int32)
    none = (None,) * 4
    for cu_seqlens in (wrong, wrong.repeat_interleave(2)[::2]):
        with pytest.raises(RuntimeError, match=f"attention: cu_seqlens must (have )?{message}"):
            raw.attention(q, q, q, 0.3, *none, cu_seqlens)
        lse, grads = torch.ones(2, 10), [torch.empty_like(q) for _ in range(3)]
        with pytest.raises(RuntimeError, match=f"attention_backward: cu_seqlens must (have )?{message}"):
            raw.attention_backward(q, q, q, q, q, lse, 0.3, *none, *grads, cu_seqlens)
    strided = torch.tensor([0, 9, 3, 9, 10, 9], dtype=torch.int32)[::2]
    out, _ = raw.attention(q, q, q, 0.3, *none, strided)
    assert torch.equal(out, raw.attention(q, q, q, 0.3, *none, strided.contiguous())[0])
    with pytest.raises(RuntimeError, match="cu_seqlens must be Int"):
        raw.attention(q, q, q, 0.3, *none, torch.tensor([0, 10]))


@backends
def test_no_sequence_and_no_token(backend) -> None:
    weight = torch.ones(16, requires_grad=True)
    for ends in ([0], [0, 0, 0]):
        qkv = torch.ones(0, 3, 2, 8, requires_grad=True)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        out = ops.qk_norm_attention_qkvpacked(qkv, weight, weight, cu_seqlens=cu_seqlens, backend=backend)
        assert out.shape == (0, 2, 8)
        grads = torch.autograd.grad(out.sum(), (qkv, weight))
        assert grads[0].shape == qkv.shape
        assert torch.equal(grads[1], torch.zeros(16))


def test_a_backend_without_packed_sequences_says_so(monkeypatch) -> None:
    q, ends = torch.ones(10, 2, 8), torch.tensor([0, 3, 10], dtype=torch.int32)
    monkeypatch.setitem(registry.BACKENDS, "sdpa", dataclasses.replace(registry.BACKENDS["sdpa"], varlen=False))
    forget_resolved()
    try:
        with pytest.raises(ValueError, match="'sdpa' cannot take this input: its attention takes no cu_seqlens"):
            ops.attention(q, q, q, cu_seqlens=ends, max_seqlen=9, backend="sdpa")
        with monkeypatch.context() as patch:
            patch.setitem(AUTO_ORDER, "cpu", ("sdpa", "reference"))
            assert resolve("attention", q, head_dim=8, varlen=True) == "reference"
    finally:
        forget_resolved()
