"""Every op of this library in ONNX's, for exported programs that still hold them.

`torch.onnx.export` of a model needs none of this: there the ops appear as PyTorch's own.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

import internvit.ops  # noqa: F401 (registers them)

_INT64 = 7  # of ONNX's TensorProto.DataType


def onnx_table() -> dict[Any, Callable[..., Any]]:
    """The `custom_translation_table` of `torch.onnx.export` for programs with ops of this library; opset 18.

    Outputs that are only kept for backward are empty.

    Returns:
        op -> a function that adds its ONNX nodes.

    Raises:
        ImportError: onnxscript is not installed.

    Example:
        >>> program = torch.export.export(model, (pixels,))
        >>> torch.onnx.export(program, f="model.onnx", custom_translation_table=internvit.export.onnx_table())
    """
    try:
        from onnxscript import opset18
    except ImportError as error:
        raise ImportError("onnx_table: onnxscript is not installed; pip install 'internvit[export]'") from error
    translations = _Translations(opset18)
    names = [name for name in dir(translations) if not name.startswith("_")]
    return {getattr(torch.ops.internvit, name).default: _function(getattr(translations, name)) for name in names}


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, on which the exporter can write an attribute."""

    @functools.wraps(method)
    def translate(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return translate


class _Translations:
    """A method for each op, with the arguments of its schema."""

    def __init__(self, op: Any) -> None:
        self._op = op

    def _ints(self, *values: int) -> Any:
        return self._op.Constant(value_ints=list(values))

    def _float(self, value: float, like: Any) -> Any:
        return self._op.CastLike(self._op.Constant(value_float=value), like)

    def _empty(self, like: Any) -> Any:
        return self._op.CastLike(self._op.Constant(value_floats=[]), like)

    def _rms(self, x: Any, axes: tuple[int, ...], eps: float) -> Any:
        """1 / sqrt(mean of squares + eps) over `axes`, which stay."""
        op = self._op
        mean = op.ReduceMean(op.Mul(x, x), self._ints(*axes), keepdims=1)
        return op.Reciprocal(op.Sqrt(op.Add(mean, self._float(eps, x))))

    def _linear(self, x: Any, weight: Any, bias: Any) -> Any:
        y = self._op.MatMul(x, self._op.Transpose(weight, perm=[1, 0]))
        return y if bias is None else self._op.Add(y, bias)

    def gelu(self, x: Any, backend: str = "") -> Any:
        op = self._op
        erf = op.Erf(op.Mul(x, self._float(0.5**0.5, x)))
        return op.Mul(op.Mul(x, self._float(0.5, x)), op.Add(erf, self._float(1.0, x)))

    def linear_gelu(self, x: Any, weight: Any, bias: Any, save_pre_activation: bool, backend: str = "") -> Any:
        return self.gelu(self._linear(x, weight, bias)), self._empty(x)

    def linear_layer_scale(self, x: Any, weight: Any, bias: Any, gamma: Any, residual: Any, backend: str = "") -> Any:
        y = self._op.Mul(self._linear(x, weight, bias), gamma)
        return y if residual is None else self._op.Add(residual, y)

    def layer_norm(self, x: Any, weight: Any, bias: Any, eps: float, backend: str = "") -> Any:
        outputs = self._op.LayerNormalization(x, weight, bias, axis=-1, epsilon=eps)
        return outputs[0] if isinstance(outputs, Sequence) else outputs, self._empty(x), self._empty(x)

    def rms_norm(self, x: Any, weight: Any, eps: float, rounding: str, backend: str = "") -> Any:
        return self._op.Mul(self._op.Mul(x, self._rms(x, (-1,), eps)), weight), self._empty(x)

    def layer_scale_residual(self, residual: Any, branch: Any, gamma: Any, row_scale: Any, backend: str = "") -> Any:
        op = self._op
        branch = branch if gamma is None else op.Mul(branch, gamma)
        if row_scale is not None:
            branch = op.Mul(branch, op.CastLike(op.Unsqueeze(row_scale, self._ints(1, 2)), branch))
        return op.Add(residual, branch)

    def layer_scale_residual_norm(
        self,
        residual: Any,
        branch: Any,
        gamma: Any,
        row_scale: Any,
        weight: Any,
        bias: Any,
        eps: float,
        norm_type: str,
        rounding: str,
        backend: str = "",
    ) -> Any:
        out = self.layer_scale_residual(residual, branch, gamma, row_scale)
        if norm_type == "rms_norm":
            return out, self.rms_norm(out, weight, eps, rounding)[0], self._empty(out), self._empty(out)
        return out, *self.layer_norm(out, weight, bias, eps)

    def qk_norm_stats(self, q: Any, k: Any, eps: float, backend: str = "") -> Any:
        squeeze, axes = self._op.Squeeze, self._ints(2, 3)
        return squeeze(self._rms(q, (2, 3), eps), axes), squeeze(self._rms(k, (2, 3), eps), axes)

    def qk_norm(
        self, q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float, rounding: str, backend: str = ""
    ) -> Any:
        normed = (self._scale_heads(x, self._rms(x, (2, 3), eps), w) for x, w in ((q, q_weight), (k, k_weight)))
        return *normed, self._empty(q), self._empty(q)

    def _scale_heads(self, x: Any, rstd: Any, weight: Any) -> Any:
        op = self._op
        heads = op.Shape(x, start=2, end=4)
        return op.Mul(op.Mul(x, rstd), op.Reshape(weight, heads))

    def _same_sequence(self, q: Any, cu_seqlens: Any, k: Any = None, cu_seqlens_k: Any = None) -> Any:
        """Which of the tokens of q [total, H, D] may attend to which of k, [total, total_k]."""
        queries = self._sequence_of(q, cu_seqlens)
        keys = queries if cu_seqlens_k is None else self._sequence_of(k, cu_seqlens_k)
        return self._op.Equal(self._op.Unsqueeze(queries, self._ints(1)), keys)

    def _sequence_of(self, q: Any, cu_seqlens: Any) -> Any:
        """The sequence of each token of q [total, H, D]."""
        op = self._op
        total = op.Squeeze(op.Shape(q, start=0, end=1))
        tokens = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
        passed = op.GreaterOrEqual(op.Unsqueeze(tokens, self._ints(1)), op.Cast(cu_seqlens, to=_INT64))
        return op.ReduceSum(op.Cast(passed, to=_INT64), self._ints(1), keepdims=0)

    def attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        scale: float,
        q_weight: Any,
        k_weight: Any,
        rstd_q: Any,
        rstd_k: Any,
        cu_seqlens: Any = None,
        max_seqlen: Any = None,
        cu_seqlens_k: Any = None,
        max_seqlen_k: Any = None,
        backend: str = "",
    ) -> Any:
        op, mask = self._op, None
        if cu_seqlens is not None:
            mask = self._same_sequence(q, cu_seqlens, k, cu_seqlens_k)
            q, k, v, rstd_q, rstd_k = (self._as_image(t) for t in (q, k, v, rstd_q, rstd_k))
        if q_weight is not None:
            q = self._scale_heads(q, op.CastLike(op.Unsqueeze(rstd_q, self._ints(2, 3)), q), q_weight)
            k = self._scale_heads(k, op.CastLike(op.Unsqueeze(rstd_k, self._ints(2, 3)), k), k_weight)
        out = self._attend(q, k, v, scale, mask)
        if cu_seqlens_k is not None:  # a query without a key has a softmax of NaN
            keys = op.ReduceSum(op.Cast(mask, to=_INT64), self._ints(1), keepdims=1)
            there = op.Unsqueeze(op.Greater(keys, op.Constant(value_int=0)), self._ints(2))
            out = op.Where(there, out, self._float(0.0, out))
        return out if cu_seqlens is None else op.Squeeze(out, self._ints(0)), self._empty(v)

    def _as_image(self, t: Any) -> Any:
        return None if t is None else self._op.Unsqueeze(t, self._ints(0))

    def _attend(self, q: Any, k: Any, v: Any, scale: float, mask: Any) -> Any:
        op = self._op
        q = op.Transpose(op.Mul(q, self._float(scale, q)), perm=[0, 2, 1, 3])
        scores = op.MatMul(q, op.Transpose(k, perm=[0, 2, 3, 1]))
        if mask is not None:
            scores = op.Where(mask, scores, self._float(-float("inf"), scores))
        out = op.MatMul(op.Softmax(scores, axis=-1), op.Transpose(v, perm=[0, 2, 1, 3]))
        return op.Transpose(out, perm=[0, 2, 1, 3])

    def qk_norm_attention(
        self,
        q: Any,
        k: Any,
        v: Any,
        q_weight: Any,
        k_weight: Any,
        eps: float,
        scale: float,
        rounding: str,
        cu_seqlens: Any = None,
        max_seqlen: Any = None,
        backend: str = "",
    ) -> Any:
        op = self._op
        mask = None if cu_seqlens is None else self._same_sequence(q, cu_seqlens)
        if cu_seqlens is not None:
            q, k, v = (self._as_image(t) for t in (q, k, v))
        if q_weight is not None:
            q, k = self.qk_norm(q, k, q_weight, k_weight, eps, rounding)[:2]
        out = self._attend(q, k, v, scale, mask)
        out = out if cu_seqlens is None else op.Squeeze(out, self._ints(0))
        return out, self._empty(v), self._empty(v), self._empty(v)

    def qk_norm_attention_qkvpacked(
        self,
        qkv: Any,
        q_weight: Any,
        k_weight: Any,
        eps: float,
        scale: float,
        rounding: str,
        cu_seqlens: Any = None,
        max_seqlen: Any = None,
        backend: str = "",
    ) -> Any:
        op, axis = self._op, 2 if cu_seqlens is None else 1
        q, k, v = (op.Squeeze(part, self._ints(axis)) for part in op.Split(qkv, axis=axis, num_outputs=3))
        return self.qk_norm_attention(q, k, v, q_weight, k_weight, eps, scale, rounding, cu_seqlens, max_seqlen)
