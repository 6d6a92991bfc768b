"""Attention with other keys than queries, and with a key-padding mask: every backend against float64, wrong arguments,
planted bugs, and what is left of images without keys."""

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from internvit import ops
from internvit.numerics import product_violations, relative_error, sample
from internvit.ops.backends import registry
from internvit.ops.backends.registry import backends_for, implementation, usable
from internvit.ops.core.attention_math import formula
from internvit.ops.core.padding import Padding
from internvit.ops.core.sequences import Sequences
from internvit.ops.core.spec import SPECS
from tests.ops.cases import backends_here
from tests.support.layouts import LAYOUTS, laid_out

PACKED = [b for b in backends_for("attention", "cpu", torch.float32, 8, varlen=True) if b != "triton"]
backends = pytest.mark.parametrize("backend", PACKED)
TENSORS = ("q", "k", "v")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def ends_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def errors(arguments: dict[str, Any], backend: str, generator: torch.Generator) -> list[float]:
    """Of the output and the gradients of q, k and v, relative to those in float64 of the same inputs."""
    results = []
    for wide in (False, True):
        leaves = {n: arguments[n].detach().double() if wide else arguments[n].detach() for n in TENSORS}
        leaves = {n: t.requires_grad_() for n, t in leaves.items()}
        out = formula(**arguments | leaves) if wide else ops.attention(**arguments | leaves, backend=backend)
        if not wide:
            grad = torch.randn(out.shape, generator=generator).to(out.dtype)
        results.append((out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype))))
    assert results[0][0].is_contiguous()
    return [relative_error(a, t) if t.any() else a.abs().sum().item() for a, t in zip(*results, strict=True)]


def bound(dtype: torch.dtype) -> float:
    return 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps


def with_length(queries: int, keys: int, heads: tuple[int, int], dtype: torch.dtype, generator) -> dict[str, Tensor]:
    """q, k and v [2, N, H, D]; k and v are views of one buffer."""
    q = sample((2, queries, *heads), "normal", dtype, generator)
    kv = sample((2, keys, 2, *heads), "normal", dtype, generator)
    return dict(zip(TENSORS, (q, *kv.unbind(2)), strict=True))


@pytest.mark.parametrize("backend", backends_here("attention"))
@dtypes
@pytest.mark.parametrize(("queries", "keys"), [(1, 257), (257, 2), (33, 96), (130, 577)])
@pytest.mark.parametrize("heads", [(2, 64), (3, 40), (1, 128)])
def test_other_keys_than_queries(backend, dtype, queries, keys, heads, generator) -> None:
    arguments = with_length(queries, keys, heads, dtype, generator)
    assert max(errors(arguments, backend, generator)) < bound(dtype)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 70)), min_size=1, max_size=5),
    head_dim=st.sampled_from([8, 24, 64, 72]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from([name for name in LAYOUTS if name != "expanded"]),
    backend=st.sampled_from(PACKED),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_any_lengths_in_a_pack(lengths, head_dim, dtype, layout, backend, seed) -> None:
    """Each pack against float64; on `cpu` each sequence has the bits that it has alone, as a batch of one."""
    assume(backend in backends_for("attention", "cpu", dtype, head_dim, varlen=True))
    generator = torch.Generator().manual_seed(seed)
    queries, keys = zip(*lengths, strict=True)
    shapes = {"q": sum(queries), "k": sum(keys), "v": sum(keys)}
    heads = {n: laid_out(torch.randn(t, 2, head_dim, generator=generator).to(dtype), layout) for n, t in shapes.items()}
    arguments = heads | {"cu_seqlens": ends_of(queries), "cu_seqlens_k": ends_of(keys)}
    # A softmax over two keys may be all but one-hot, and gradients differences of numbers of the usual size.
    assert max(errors(arguments, backend, generator)) < (1e-4 if dtype == torch.float32 else 0.2)
    if backend != "cpu":
        return
    packed = ops.attention(**arguments, backend="cpu")
    for rows, columns in zip(pairwise(arguments["cu_seqlens"]), pairwise(arguments["cu_seqlens_k"]), strict=True):
        q, k, v = (heads[n][slice(*(rows if n == "q" else columns))][None] for n in TENSORS)
        assert torch.equal(packed[slice(*rows)], ops.attention(q, k, v, backend="cpu")[0])


@backends
@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_no_queries_and_no_keys(backend, queries, keys, packed) -> None:
    """As PyTorch: sums over no key are 0, and the logarithm of one is -inf."""
    heads = {n: torch.randn(2, queries if n == "q" else keys, 2, 8, requires_grad=True) for n in TENSORS}
    given: dict[str, Any] = {}
    if packed:
        heads = {n: t.flatten(0, 1) for n, t in heads.items()}
        given = {"cu_seqlens": ends_of((queries,) * 2), "cu_seqlens_k": ends_of((keys,) * 2)}
    out = ops.attention(**heads, **given, backend=backend)
    assert out.shape == heads["q"].shape
    for t in (out, *torch.autograd.grad(out.sum(), list(heads.values()))):
        assert not t.any()
    longest = ((given["cu_seqlens"], queries, given["cu_seqlens_k"], keys) if packed else [None] * 4,)
    with torch.no_grad():
        lse = torch.ops.internvit.attention(*heads.values(), 0.3, *[None] * 4, *longest[0], backend)[1]
    assert lse.shape[-1] == out.shape[0 if packed else 1]
    assert (lse == -float("inf")).all()


VALID = {"q": torch.ones(10, 2, 8), "k": torch.ones(7, 2, 8), "v": torch.ones(7, 2, 8)}
BAD_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens_k": [0, 3, 6]}, r"cu_seqlens_k must begin with 0 and end with 7 \(tokens\), got \[0, 3, 6\]"),
    ({"cu_seqlens_k": [0, 8, 7]}, "cu_seqlens_k must not decrease"),
    ({"cu_seqlens_k": [0, 7]}, r"cu_seqlens_k must have cu_seqlens's shape \[3\], got \[2\]"),
    ({"max_seqlen_k": 3}, r"max_seqlen_k must be at least 4 \(the longest sequence\), got 3"),
    ({"max_seqlen_k": -1}, "max_seqlen_k must be an integer >= 0"),
    ({"cu_seqlens_k": None, "max_seqlen_k": 4}, "go together, got None for cu_seqlens_k"),
    ({"cu_seqlens_k": None}, r"k must have q's shape \[10, 2, 8\], got \[7, 2, 8\]"),
    ({"cu_seqlens": None}, "cu_seqlens must be given beside cu_seqlens_k, got None"),
    ({"k": torch.ones(7, 3, 8)}, r"k must have shape \[N_k, 2, 8\] \(q's, of any number of tokens\), got \[7, 3, 8\]"),
    ({"v": torch.ones(6, 2, 8)}, r"v must have k's shape \[7, 2, 8\], got \[6, 2, 8\]"),
    ({"k": torch.ones(7, 2, 8).half()}, "k must have q's dtype torch.float32, got torch.float16"),
    (
        {n: torch.ones(10, 2, 8) for n in "kv"}
        | {"cu_seqlens_k": [0, 3, 10], **dict.fromkeys(("q_weight", "k_weight"), torch.ones(16))}
        | dict.fromkeys(("rstd_q", "rstd_k"), torch.ones(10)),
        "cu_seqlens_k must be None with QK-norm inside",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD_KEYS)
def test_bad_sequences_of_keys(change, message) -> None:
    arguments: dict[str, Any] = {**VALID, "cu_seqlens": [0, 3, 10], "cu_seqlens_k": [0, 3, 7], **change}
    for n in ("cu_seqlens", "cu_seqlens_k"):
        arguments[n] = None if arguments[n] is None else torch.tensor(arguments[n], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ops.attention(**arguments)


def test_qk_norm_is_of_the_same_tokens() -> None:
    q, k, weight = torch.ones(2, 5, 2, 8), torch.ones(2, 3, 2, 8), torch.ones(16)
    message = r"k must have q's shape \[2, 5, 2, 8\], got \[2, 3, 2, 8\]"
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, k, weight, weight, torch.ones(2, 5), torch.ones(2, 3))
    with pytest.raises(ValueError, match=message):
        ops.qk_norm_attention(q, k, k, weight, weight)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 3, 9], "begin with 0 and end with 7"),
        ([0, 2**30, 7], "not decrease"),
        ([0, -(2**30), 7], "not decrease"),
        ([0, 7], r"have shape \[3\]"),
    ],
)
def test_raw_ops_read_and_write_nothing_outside(ends, message) -> None:
    if registry.BACKENDS["cpu"].unavailable_reason() is not None:
        pytest.skip("the library internvit_cpu is not built")
    usable("cpu").find("attention")
    raw, none = torch.ops.internvit_cpu, (None,) * 4
    q, k, v, queries = *VALID.values(), ends_of((3, 7))
    keys = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"attention: cu_seqlens_k must {message}"):
        raw.attention(q, k, v, 0.3, *none, queries, keys)
    grads, lse = [torch.empty_like(t) for t in (q, k, v)], torch.ones(2, 10)
    with pytest.raises(RuntimeError, match=f"attention_backward: cu_seqlens_k must {message}"):
        raw.attention_backward(q, q, k, v, q, lse, 0.3, *none, *grads, queries, keys)
    with pytest.raises(RuntimeError, match=r"attention_backward: grad_v must have shape \[7, 2, 8\]"):
        raw.attention_backward(q, q, k, v, q, lse, 0.3, *none, *grads[:2], grads[0], queries, ends_of((3, 4)))
    with pytest.raises(RuntimeError, match="attention: cu_seqlens must be given beside cu_seqlens_k"):
        raw.attention(*torch.ones(3, 1, 10, 2, 8), 0.3, *none, None, ends_of((3, 4)))


def rows_of_keys(ends: Tensor, shift: int) -> Tensor:
    return torch.cat([ends[:1], (ends[1:-1] + shift).clamp(0, int(ends[-1])), ends[-1:]])


BUGS = {
    "keys end a token late": lambda s: s._replace(cu_seqlens_k=rows_of_keys(s.cu_seqlens_k, 1)),
    "keys of all sequences": lambda s: s._replace(
        cu_seqlens=s.cu_seqlens[[0, -1]],
        cu_seqlens_k=s.cu_seqlens_k[[0, -1]],
        max_seqlen=int(s.cu_seqlens[-1]),
        max_seqlen_k=int(s.cu_seqlens_k[-1]),
    ),
    "keys of the sequence before": lambda s: s._replace(cu_seqlens_k=s.keys.lengths.roll(1).cumsum(0).int()),
}


@backends
@pytest.mark.parametrize("direction", ["attention", "attention_backward"])
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_planted_bugs_are_found(backend, direction, bug, generator, monkeypatch) -> None:
    queries, keys = (9, 4, 20, 1), (5, 13, 2, 8)
    heads = {n: torch.randn(34 if n == "q" else 28, 2, 16, generator=generator) for n in TENSORS}
    real = implementation(direction, backend)

    def wrong(sequences: Sequences) -> Sequences:
        made = BUGS[bug](sequences)
        ends_k = made.cu_seqlens_k
        if len(ends_k) < len(made.cu_seqlens):
            ends_k = torch.cat([ends_k.new_zeros(1), ends_k])
        return made._replace(cu_seqlens_k=ends_k, max_seqlen_k=int(ends_k.diff().max()))

    def planted(*args: Any) -> Any:
        *others, last = args
        if direction == "attention":
            return real(*others, wrong(last))
        grad_out, saved = others
        return real(grad_out, saved._replace(sequences=wrong(saved.sequences)), last)

    if bug is not None:
        monkeypatch.setitem(registry._IMPLEMENTATIONS, (direction, backend), planted)
    arguments = heads | {"cu_seqlens": ends_of(queries), "cu_seqlens_k": ends_of(keys)}
    assert (max(errors(arguments, backend, generator)) > 1e-3) == (bug is not None)


def padded(generator: torch.Generator, dtype: torch.dtype = torch.float32, tokens: int = 37) -> dict[str, Tensor]:
    """A self-attention batch: some padding, none, all but one token, all tokens."""
    heads = sample((4, tokens, 3, 2, 24), "normal", dtype, generator).unbind(2)
    mask = torch.rand(4, tokens, generator=generator) < 0.4
    mask[1], mask[2], mask[3] = False, True, True
    mask[2, tokens // 2] = False
    return dict(zip(TENSORS, heads, strict=True)) | {"key_padding_mask": mask}


OPS: dict[str, tuple[Any, Any]] = {
    "attention": (ops.attention, SPECS["attention"].formula),
    "qk_norm_attention": (ops.qk_norm_attention, SPECS["qk_norm_attention"].formula),
}
each_op = pytest.mark.parametrize("op", OPS)


def weights_of(op: str, generator: torch.Generator, dtype: torch.dtype) -> dict[str, Tensor]:
    if op == "attention":
        return {}
    return {n: (1 + 0.3 * torch.randn(48, generator=generator)).to(dtype) for n in ("q_weight", "k_weight")}


@backends
@each_op
@dtypes
def test_padding_against_float64(backend, op, dtype, generator) -> None:
    """Whatever padding holds; its gradients, and those of an image that is all padding, are 0."""
    arguments = padded(generator, dtype) | weights_of(op, generator, dtype)
    mask = arguments.pop("key_padding_mask")
    function, plain = OPS[op]
    grad = torch.randn(4, 37, 2, 24, generator=generator).to(dtype)
    leaves = {n: t.clone().requires_grad_() for n, t in arguments.items()}
    wide = {n: t.detach().double().requires_grad_() for n, t in arguments.items()}
    names = ("k", "v") if op == "attention" else TENSORS
    with torch.no_grad():
        for n in names:
            leaves[n][mask] = float("nan")
    out = function(**leaves, key_padding_mask=mask, backend=backend)
    truth, eager = (plain(**given, key_padding_mask=mask) for given in (wide, arguments))
    assert product_violations(out, truth, eager, 2.0 if dtype == torch.float32 else 1.1) == []
    assert not out[3].any()
    actual = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))
    expected = torch.autograd.grad(truth, list(wide.values()), grad.double())
    for (name, a), t in zip(actual.items(), expected, strict=True):
        assert relative_error(a, t) < bound(dtype), name
        if name in names:
            assert not a[mask].any(), name


@backends
@each_op
def test_without_padding_as_without_a_mask(backend, op, generator) -> None:
    arguments = padded(generator) | weights_of(op, generator, torch.float32)
    outs, grads = [], []
    mask = arguments.pop("key_padding_mask")
    for settings_of in ({"key_padding_mask": torch.zeros_like(mask)}, {}):
        leaves = {n: t.clone().requires_grad_() for n, t in arguments.items()}
        outs.append(OPS[op][0](**leaves, **settings_of, backend=backend))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [leaves[n] for n in TENSORS]))
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert torch.equal(a, b) if backend == "cpu" else relative_error(a, b) < 1e-6


def test_the_convention_is_that_of_multihead_attention(generator) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True, bias=False)
    x, keys = torch.randn(3, 5, 16, generator=generator), torch.randn(3, 9, 16, generator=generator)
    mask = torch.rand(3, 9, generator=generator) < 0.5
    mask[:, 0] = False
    weights = attention.in_proj_weight.chunk(3)
    q, k, v = ((t @ w.t()).unflatten(-1, (2, 8)) for t, w in zip((x, keys, keys), weights, strict=True))
    out = attention.out_proj(ops.attention(q, k, v, key_padding_mask=mask).flatten(2))
    torch.testing.assert_close(out, attention(x, keys, keys, key_padding_mask=mask, need_weights=False)[0])


@each_op
def test_padding_compiles_whole_for_any_mask(op, generator) -> None:
    """Training, with one graph for every mask and, dynamic, every size: no size depends on the mask's values."""
    torch._dynamo.reset()
    graphs = []

    def count(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    function = torch.compile(OPS[op][0], fullgraph=True, dynamic=True, backend=count)
    for tokens in (37, 12, 55):
        arguments = padded(generator, tokens=tokens) | weights_of(op, generator, torch.float32)
        leaves = {n: arguments[n].clone().requires_grad_() for n in TENSORS}
        outs = [f(**arguments | leaves, backend="reference") for f in (function, OPS[op][0])]
        grads = [torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in outs]
        for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, r"must have shape \[2, 5\] \(k's"),
        (
            {"key_padding_mask": torch.zeros(2, 5)},
            ValueError,
            "must be torch.bool, True for padding, got",
        ),
        ({"key_padding_mask": [[True] * 5] * 2}, TypeError, r"must be a torch\.Tensor, got list"),
        ({"key_padding_mask": torch.zeros(2, 5, dtype=torch.bool, device="meta")}, ValueError, "on q's device cpu"),
        ({"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, "must be None beside cu_seqlens"),
        ({"q": torch.ones(5, 2, 8)}, ValueError, r"q must have shape \[B, N, H, D\]"),
        ({"v": torch.ones(2, 4, 2, 8)}, ValueError, r"v must have [kq]'s shape \[2, 5, 2, 8\], got \[2, 4, 2, 8\]"),
        ({"scale": float("nan")}, ValueError, "scale must be a finite number"),
    ],
)
@each_op
def test_bad_masks(op, change, error, message) -> None:
    arguments: dict[str, Any] = {n: torch.ones(2, 5, 2, 8) for n in TENSORS}
    arguments["key_padding_mask"] = torch.zeros(2, 5, dtype=torch.bool)
    OPS[op][0](**arguments)
    with pytest.raises(error, match=f"^{op}: .*{message}"):
        OPS[op][0](**arguments | change)


@pytest.mark.parametrize(
    "bug",
    [
        lambda p: p._replace(ends=rows_of_keys(p.ends, 1)),
        lambda p: p._replace(order=torch.arange(p.order.numel())),
        lambda p: p._replace(mask=p.mask.roll(1, 1)),
    ],
)
@each_op
def test_planted_bugs_of_padding_are_found(op, bug, generator, monkeypatch) -> None:
    arguments = padded(generator)
    expected = OPS[op][1](**arguments)
    assert relative_error(OPS[op][0](**arguments), expected) < 1e-5
    made = Padding.of
    monkeypatch.setattr(Padding, "of", lambda mask: bug(made(mask)))
    assert not relative_error(OPS[op][0](**arguments), expected) < 1e-3
