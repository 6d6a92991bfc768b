"""What tests/support/interpreter.py mends is still broken in Triton, and mended here."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter

from tests.support import interpreter


@triton.jit
def round_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n).to(tl.bfloat16), mask=o < n)


@triton.jit
def dot_kernel(p_a, p_b, p_y):
    o = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(p_y + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


@triton.jit
def twice(x):
    return x + x


@triton.jit
def calling_kernel(p_y, n):
    for i in range(n):
        tl.store(p_y + i, twice(i))


@triton.jit
def square_kernel(p_y, n):
    tl.store(p_y, n * n)


def square(n: int) -> int:
    y = torch.zeros(1, dtype=torch.int32)
    square_kernel[(1,)](y, n)
    return y.item()


@pytest.fixture
def replacements(monkeypatch):
    """The functions for which `triton.language` was replaced."""
    seen, patch = [], interpreter.triton_patch_lang
    monkeypatch.setattr(interpreter, "triton_patch_lang", lambda fn: seen.append(fn) or patch(fn))
    return seen


@pytest.fixture
def as_shipped(monkeypatch):
    monkeypatch.setattr(triton_interpreter, "_convert_float", interpreter.triton_convert_float)
    monkeypatch.setattr(triton_interpreter.InterpreterBuilder, "create_dot", interpreter.triton_create_dot)


def rounded(x: torch.Tensor) -> torch.Tensor:
    y = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
    round_kernel[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


def test_mended_rounding_equals_torch():
    bits = np.random.default_rng(0).integers(0, 2**32, size=1 << 16, dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    ties = torch.from_numpy((bits[:4096] & np.uint32(0xFFFF0000) | np.uint32(0x8000)).view(np.float32))
    x = torch.cat([x, ties, torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 3.4e38, 1e-45])])
    expected, actual = x.bfloat16(), rounded(x)
    assert torch.equal(expected.isnan(), actual.isnan())
    finite = ~expected.isnan()
    assert torch.equal(expected[finite].view(torch.int16), actual[finite].view(torch.int16))


def test_mended_dot_equals_torch():
    a, b = (torch.randn(16, 16, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    y = torch.full((16, 16), float("nan"))
    dot_kernel[(1,)](a, b, y)
    torch.testing.assert_close(y, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


def test_language_is_replaced_once_a_launch(replacements):
    for launches in (1, 2):
        y = torch.full((4,), -1, dtype=torch.int32)
        calling_kernel[(1,)](y, 4)
        assert y.tolist() == [0, 2, 4, 6]
        assert len(replacements) == launches
        assert tl.core.is_builtin(tl.load), "the launch did not restore triton.language"


def test_an_overflow_of_int32_is_an_error():
    assert square(46340) == 46340**2
    with pytest.raises(triton.runtime.errors.InterpreterError, match="mul of int32: 2147488281"):
        square(46341)


def test_triton_still_lets_integers_overflow(monkeypatch):
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", interpreter.triton_refuse_overflow)
    assert square(46341) < 0, "Triton refuses this now: drop _refuse_overflow from tests/support/interpreter.py"


def test_types_of_blocks_are_told_apart():
    shapes = [[16, 32], [32, 16], [16], (tl.constexpr(16), 32)]
    types = [tl.block_type(dtype, shape) for dtype in (tl.float32, tl.int32) for shape in shapes for _ in range(2)]
    sizes = [(16, 32), (32, 16), (16,), (16, 32)]
    assert [(t.scalar, *t.shape) for t in types] == [
        (dtype, *size) for dtype in (tl.float32, tl.int32) for size in sizes for _ in range(2)
    ]
    assert {(t.scalar, t.numel) for t in types} == {(d, n) for d in (tl.float32, tl.int32) for n in (16, 512)}


def test_triton_still_replaces_its_language_at_each_call(replacements, monkeypatch):
    monkeypatch.setattr(triton_interpreter, "_patch_lang", lambda fn: interpreter.triton_patch_lang(fn))
    calling_kernel[(1,)](torch.zeros(4, dtype=torch.int32), 4)
    assert len(replacements) > 1, "Triton replaces it once now: drop _patch_lang from tests/support/interpreter.py"


@pytest.mark.usefixtures("as_shipped")
def test_triton_still_truncates():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    wrong = (rounded(x) != x.bfloat16()).double().mean().item()
    assert wrong > 0.4, "Triton rounds float32 to bfloat16 now: drop _convert_float from tests/support/interpreter.py"


@pytest.mark.usefixtures("as_shipped")
def test_triton_still_multiplies_raw_bits():
    a = torch.eye(16, dtype=torch.bfloat16)
    y = torch.full((16, 16), float("nan"))
    dot_kernel[(1,)](a, a, y)
    assert not torch.equal(y, torch.eye(16)), "Triton multiplies bfloat16 now: drop _create_dot"
